"""Processes of an application whose models have several ranks each are killed while they answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from openai import APIConnectionError, APIError, OpenAI
from served import LETTERS, ON_RAY, complete, health, local_api, pieces, seconds_until_free, served
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytestmark = ON_RAY

SPECULATIVE: dict[str, Any] = {"strategy": "speculative", "num_draft_tokens": 3}
TARGET_RANKS, DRAFTER_RANKS = 2, 3
LENGTH = 600


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_network: Callable[..., PreTrainedModel],
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
) -> dict[str, Any]:
    """The configuration of a model of letters whose heads can be shared by two and by three."""
    folder = tmp_path_factory.mktemp("shared")
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
    tiny_network(12, seed=1, layers=1, window=8192, **shape).save_pretrained(folder)
    letter_tokenizer(12).save_pretrained(folder)
    return {"model": str(folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1, "num_cpus": 0.2}


@pytest.fixture(scope="module")
def expected(engine: dict[str, Any]) -> str:
    """What one process writes without any drafts."""
    with local_api({"target": engine, "colocated": True}) as url:
        return complete(url, {"strategy": "autoregressive"}, LENGTH)[0]


@pytest.fixture(scope="module")
def url(engine: dict[str, Any]) -> Iterator[str]:
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    config = {
        "target": engine | {"tensor_parallel": TARGET_RANKS},
        "drafter": engine | {"tensor_parallel": DRAFTER_RANKS},
        "retriever": {"long_content_tokens": 64, "options": options},
    }
    with served(config) as url:
        yield url


def processes(title: str) -> set[psutil.Process]:
    family = psutil.Process().children(recursive=True)
    return {process for process in family if " ".join(process.cmdline()).startswith(f"ray::{title}")}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_several_ranks_write_what_one_process_does(url: str, expected: str) -> None:
    text, statistics = complete(url, SPECULATIVE, 100)
    assert text == expected[:100]
    assert statistics["drafted"] and len(processes("RankActor")) == TARGET_RANKS + DRAFTER_RANKS - 2


def test_an_answer_survives_the_death_of_ranks_and_whole_groups_come_back(url: str, expected: str) -> None:
    running = pieces(url, SPECULATIVE, LENGTH)
    begun, _ = next(running)
    engines, ranks = processes("EngineActor"), processes("RankActor")
    for rank in ranks:  # the target's other one, and the drafter's
        rank.kill()
    *rest, (end, statistics) = running
    assert begun + "".join(text for text, _ in rest) + end == expected
    assert statistics["resumed"] == 1 and statistics["drafters_lost"] >= 1
    wait_until(lambda: len(processes("RankActor")) == len(ranks))
    assert not engines & processes("EngineActor") and not ranks & processes("RankActor")
    wait_until(lambda: complete(url, SPECULATIVE)[1]["drafted"] > 0)
    assert complete(url, SPECULATIVE, 100)[0] == expected[:100]


def test_a_coordinator_that_dies_ends_its_answers_with_an_error_and_leaves_nothing_behind(
    url: str, expected: str
) -> None:
    running = pieces(url, SPECULATIVE, 5000)
    next(running)
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": LETTERS, "max_tokens": 5000, "rapid": SPECULATIVE}
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        wait_until(lambda: health(url)["sequences"] == {"target": 2, "drafter": 2})
        [coordinator] = processes("ServeReplica:rapid:Coordinator")
        coordinator.kill()
        with pytest.raises(APIError, match="a part of the service stopped"):
            list(running)
        assert whole.result().status_code == 503 and whole.result().headers["retry-after"]
    assert complete(url, SPECULATIVE)[0] == expected[:24]  # by the next one, which a request waits for
    seconds_until_free(url)  # long before a sequence counts as idle


def test_a_stream_whose_ingress_dies_is_cut_off_and_the_next_request_is_served(url: str, expected: str) -> None:
    running = pieces(url, SPECULATIVE, LENGTH)
    next(running)
    [ingress] = processes("ServeReplica:rapid:Ingress")
    ingress.kill()
    with pytest.raises(APIConnectionError):
        list(running)
    assert complete(url, SPECULATIVE)[0] == expected[:24]  # it waits for the next ingress
    seconds_until_free(url, 60)  # what nobody reads is written to its end


def test_a_batch_whose_ingress_dies_is_answered_by_the_next_one(url: str, expected: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    body = {"model": model, "prompt": LETTERS, "max_tokens": 100, "temperature": 0, "rapid": SPECULATIVE}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    asked = "\n".join(json.dumps(line | {"custom_id": str(i)}) for i in range(20))
    source = client.files.create(file=("asked.jsonl", asked.encode()), purpose="batch")
    made = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")

    def num_answered() -> int:
        counts = client.batches.retrieve(made.id).request_counts
        return counts.completed if counts else 0

    wait_until(lambda: num_answered() > 0)
    [ingress] = processes("ServeReplica:rapid:Ingress")
    ingress.kill()
    assert complete(url, SPECULATIVE)[0] == expected[:24]  # it waits for the next ingress
    done = num_answered()
    assert 0 < done < 20
    wait_until(lambda: client.batches.retrieve(made.id).status not in ("validating", "in_progress", "finalizing"))
    batch = client.batches.retrieve(made.id)
    assert batch.output_file_id is not None and batch.request_counts is not None
    answers = [json.loads(answer) for answer in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(int(answer["custom_id"]) for answer in answers) == list(range(20))
    assert {answer["response"]["body"]["choices"][0]["text"] for answer in answers} == {expected[:100]}
