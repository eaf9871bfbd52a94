"""Drafts from a datastore: which tokens, how much speaks for them, what is learned, and that the output stays p."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.output_law import of_a_datastore
from rapid.datastore.search import SEPARATOR, Datastore, Segment, suffix_array
from rapid.drafters.datastore import DatastoreDrafter
from rapid.drafters.session import Session
from rapid.events import Statistics
from rapid.speculation.draft import DraftLimits, VerifyResult
from rapid.speculation.learned import Learned


def drafter_of(prompt: list[int], output: list[int], *texts: list[int], strategy: str = "rest") -> DatastoreDrafter:
    datastore = None
    if texts:
        tokens = np.array([token for text in texts for token in [*text, SEPARATOR]], np.uint32)
        datastore = Datastore([Segment(tokens, suffix_array(tokens))])
    request: Any = SimpleNamespace(
        prompt=SimpleNamespace(tokens=prompt), datastore=datastore, speculation=SimpleNamespace(strategy=strategy)
    )
    return DatastoreDrafter(
        cast(
            Session,
            SimpleNamespace(request=request, output=output, statistics=Statistics(strategy), learned=Learned()),
        )
    )


def verdict(tokens: list[int], num_drafted: int) -> VerifyResult:
    return VerifyResult(tokens, num_drafted, len(tokens) - 1, 0, [1.0] * num_drafted, 0.0, 0.0, 1.0)


def test_the_draft_goes_on_from_prompt_and_output_together() -> None:
    output: list[int] = []
    drafter = drafter_of([9, 1, 2], output, [1, 2, 3, 4, 5, 6, 7, 8])
    offer = drafter.offer(100)
    assert offer is not None and offer.known is not None and offer.max_tokens == len(offer.known) == 6
    assert (asyncio.run(drafter.propose(DraftLimits(2)))).tokens == [3, 4]
    output += [3, 5]  # the second was refused, and nothing goes on like this
    drafter.observe(verdict([3, 5], 2))
    assert drafter.offer(100) is None
    output += [4, 5, 6]
    offer = drafter.offer(1)
    assert offer is not None and offer.max_tokens == 1
    draft = asyncio.run(drafter.propose(DraftLimits(1)))
    assert (draft.offset, draft.tokens) == (5, [7])


def test_a_long_match_and_a_large_share_are_evidence() -> None:
    def evidence(prompt: list[int], *texts: list[int]) -> list[float]:
        found = drafter_of(prompt, [], *texts).find(2)
        assert found is not None
        return list(found.evidence)

    assert evidence([1, 2], [1, 2, 3, 4]) == [2 / 2, 3 / 2]
    assert evidence([5, 6, 1, 2], [5, 6, 1, 2, 3, 4]) == [4 / 2, 5 / 2]
    assert evidence([1, 2], *[[1, 2, 3, 4]] * 3, [1, 2, 7, 7]) == [2 * 3 / 5, 3 * 3 / 4]


def test_it_learns_from_its_own_drafts_alone() -> None:
    drafter = drafter_of([1, 2], [], [1, 2, 3, 4, 5])

    def promised() -> float:
        offer = drafter.offer(100)
        assert offer is not None and offer.known is not None
        return offer.known[0]

    before = promised()
    drafter.observe(verdict([9], 3))  # another drafter's
    assert promised() == before
    for _ in range(20):
        asyncio.run(drafter.propose(DraftLimits(2)))
        drafter.observe(verdict([9], 2))
    assert promised() < before / 2


@pytest.mark.parametrize(("strategy", "told"), [("rest", "no_datastore"), ("rapid", None)])
def test_without_a_datastore_there_is_no_offer(strategy: str, told: str | None) -> None:
    drafter = drafter_of([1, 2], [], strategy=strategy)
    assert drafter.offer(100) is None and drafter._session.statistics.fallback == told


def test_what_is_written_is_distributed_as_the_target_has_it() -> None:
    """At each position of the draft and behind it, 200,000 samples or more on a vocabulary of ten."""
    for temperature in (0.5, 1.0):
        law = of_a_datastore(temperature, 500_000)
        assert law["samples"] >= 200_000 and law["total_variation"] < 0.01
