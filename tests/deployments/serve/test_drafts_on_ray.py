"""Drafts from earlier answers, and answers to choose from, where engines and retriever are other processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import ON_RAY, complete, seconds_until_free, served

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def url(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    retriever = {"long_content_tokens": 64, "options": options}
    more = {"files": {"folder": str(tmp_path_factory.mktemp("files"))}, "datastore": {"answer_tokens": 1000}}
    with served({"target": engine, "drafter": engine, "retriever": retriever, **more}) as url:
        yield url


def test_rest_drafts_from_the_answer_before(url: str) -> None:
    plain, _ = complete(url, {"strategy": "autoregressive"}, 48)  # which is kept, too
    text, statistics = complete(url, {"strategy": "rest", "num_draft_tokens": 4}, 48)
    assert text == plain
    assert 20 < statistics["datastore_accepted"] == statistics["accepted"]
    assert statistics["rounds"] == 48 - statistics["accepted"]


def test_speculative_rag_leases_a_sequence_for_each_draft_and_gives_all_back(url: str) -> None:
    text, statistics = complete(url, {"strategy": "speculative_rag", "num_answers": 3})
    assert len(text) == 24 and statistics["fallback"] is None
    assert [each["tokens"] for each in statistics["answers"]] == [24] * 3
    assert sum(each["chosen"] for each in statistics["answers"]) == 1
    seconds_until_free(url)
