"""Models in this process as an evaluation asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import local_api

from deployments.config import parse_config
from deployments.evaluation.config import Row, System
from deployments.evaluation.local_runner import LocalRunner
from deployments.evaluation.runner import Ask, Reply, decoding, reading
from deployments.evaluation.server_runner import ServerRunner
from deployments.evaluation.weaker import rounded

FILLING = "The weather on that day was as it had been on all the days before, and nobody spoke of it. "
DOCUMENT = FILLING * 30 + "The password of the lighthouse is heliotrope. " + FILLING * 30
OTHER = FILLING * 30 + "The password of the lighthouse is marmalade. " + FILLING * 30
QUERY = "What is the password of the lighthouse?"
ARGS = {
    "target": {"kv_memory_gib": 0.5},
    "colocated": True,
    "retriever": {"options": {"chunk_tokens": 64, "max_tokens": 192, "threshold": -1.0}},
}


@pytest.fixture(scope="module")
def runner() -> Iterator[LocalRunner]:
    with LocalRunner.open(System(args=parse_config(ARGS))) as opened:
        yield opened


def answer(runner: LocalRunner, *, retrieve_from: str = "read", rapid: dict[str, Any], **fields: Any) -> Reply:
    row = Row.model_validate({"name": "row", "rapid": rapid, "retrieve_from": retrieve_from})
    messages = ({"role": "user", "content": f"{DOCUMENT}\n\n{QUERY}"},)
    return asyncio.run(runner.answer(Ask(messages, 8, row, 0.0, 1, query=QUERY, **fields)))


def test_a_reply_tells_how_it_came_about(runner: LocalRunner) -> None:
    reply = answer(runner, rapid={"strategy": "speculative", "num_draft_tokens": 3})
    assert reply.tokens == reply.decoded == sum(reply.origins.values()) == decoding(reply.statistics)[0]
    assert "".join(text for _, text in reply.pieces) == reply.text
    assert reply.statistics["drafted"] > 0 and reply.origins.keys() <= {"accepted", "recovered", "bonus", "plain"}
    assert any("heliotrope" in passage.text for passage in reply.passages)
    assert all(passage.text == DOCUMENT[passage.start : passage.end] for passage in reply.passages)
    assert 0 < reading(reply.statistics) < reply.total_s


def test_passages_can_come_from_a_document_that_the_target_does_not_read(runner: LocalRunner) -> None:
    fixed = {"strategy": "speculative", "num_draft_tokens": 3}
    reply = answer(runner, rapid=fixed, retrieve_from="unrelated", source=OTHER)
    assert any("marmalade" in passage.text for passage in reply.passages)
    assert not any("heliotrope" in passage.text for passage in reply.passages)
    # The target reads its own document all the same: speculation is exact.
    assert reply.text == answer(runner, rapid={"strategy": "autoregressive"}).text


def test_an_unread_prompt_is_read_whatever_is_known_of_it(runner: LocalRunner) -> None:
    alone = {"strategy": "autoregressive"}
    answer(runner, rapid=alone)
    known = answer(runner, rapid=alone)
    assert known.has_read is False and known.statistics["cached_tokens"] > 1000
    for _ in range(2):
        unread = answer(runner, rapid=alone, unread=True)
        assert unread.has_read is True and unread.statistics["cached_tokens"] < 100
    assert answer(runner, rapid=alone).has_read is False


def test_a_server_of_ours_tells_the_same(runner: LocalRunner) -> None:
    rapid = {"strategy": "speculative", "num_draft_tokens": 3}
    here = answer(runner, rapid=rapid)
    with local_api(ARGS) as url:
        served = ServerRunner(System(url=f"{url}/v1"))
        row = Row.model_validate({"name": "row", "rapid": rapid})
        messages = ({"role": "user", "content": f"{DOCUMENT}\n\n{QUERY}"},)
        there = asyncio.run(served.answer(Ask(messages, 8, row, 0.0, 1, query=QUERY)))
    assert served.is_rapid and there.has_read and not there.is_clocked_here
    assert (there.text, there.pieces, there.origins) == (here.text, here.pieces, here.origins)
    assert (there.tokens, there.decoded, there.finish) == (here.tokens, here.decoded, here.finish)
    assert [passage[:3] for passage in there.passages] == [passage[:3] for passage in here.passages]


def test_rest_needs_a_datastore(runner: LocalRunner) -> None:
    assert "rapid datastore build" in str(
        runner.refusal(Row.model_validate({"name": "r", "rapid": {"strategy": "rest"}}))
    )
    assert runner.refusal(Row.model_validate({"name": "r", "rapid": {"strategy": "rapid"}})) is None


def test_weights_of_few_bits_have_one_scale_a_row() -> None:
    weight = torch.randn(6, 64) * torch.arange(6)[:, None]
    weight[2, 5] = 50.0
    for bits in (2, 4):
        coarse = rounded(weight, bits)
        most = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(1) / most
        assert torch.all((coarse - weight).abs() <= scale[:, None] / 2 + 1e-6)
        assert all(len(row.unique()) <= 2 * most + 1 for row in coarse)
        assert coarse[0].abs().sum() == 0 and coarse[2, 5] == 50.0


def test_a_weaker_copy_is_a_model_of_its_own(smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from deployments.evaluation.weaker import weaker_copy

    monkeypatch.setenv("RAPID_CACHE", str(tmp_path))
    folder = weaker_copy(str(smollm), 4)
    assert tmp_path in folder.parents and weaker_copy(str(smollm), 4) == folder
    whole = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    weak = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    path = "model.layers.3.mlp.up_proj.weight"
    assert torch.allclose(weak.get_parameter(path), rounded(whole.get_parameter(path), 4), rtol=1e-2)
    assert torch.equal(
        weak.get_parameter("model.norm.weight"), whole.get_parameter("model.norm.weight").bfloat16().float()
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
