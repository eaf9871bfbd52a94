"""What followed the last time is found, by the longest match."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from rapid.drafters.lookup import NGRAM, Lookup, LookupDrafter
from rapid.drafters.session import Session
from rapid.speculation.draft import DraftLimits, VerifyResult
from rapid.speculation.learned import Learned


def found(text: str, max_tokens: int = 3) -> tuple[int, str] | None:
    match = Lookup([ord(letter) for letter in text]).find(max_tokens)
    return (match[0], "".join(map(chr, match[1]))) if match else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefg abc", (3, "def")),
        ("xabcd yabce yabc", (5, "e y")),  # the longest match, though it is not the only one
        ("yabce xabcd yabc", (4, "e x")),
        ("abc1 abc2 abc", (4, "2 a")),  # " abc" matches further back than "abc" does
        ("abc1abc2abc", (3, "2ab")),  # of equals the latest
        ("aaaaa", (4, "a")),  # a match may overlap with what it is matched to
        ("abcdab", None),
        ("abc", None),
        ("ab", None),
        ("", None),
    ],
)
def test_the_longest_match_is_continued(text: str, expected: tuple[int, str] | None) -> None:
    assert found(text) == expected


def test_no_more_is_found_than_asked_for_or_there() -> None:
    assert found("abcdefg abc", 1) == (3, "d")
    assert found("abcdefg abc", 100) == (3, "defg abc")


def test_growing_is_the_same_as_beginning_with_all_of_it() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = [rng.randint(0, 2) for _ in range(rng.randint(0, 30))]
        grown, start = Lookup([]), 0
        while start < len(text):
            end = min(len(text), start + rng.randint(1, 5))
            grown.extend(text[start:end])
            start = end
            assert grown.find(4) == Lookup(text[:end]).find(4)


def test_what_is_found_is_in_the_text_behind_its_match() -> None:
    rng = random.Random(2)
    num_found = 0
    for _ in range(200):
        text = [rng.randint(0, 3) for _ in range(rng.randint(0, 40))]
        match = Lookup(text).find(4)
        endings = {tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM)}
        assert (match is not None) == (tuple(text[len(text) - NGRAM :]) in endings)
        if match:
            length, tokens = match
            whole = text[len(text) - length :] + tokens
            assert any(text[i : i + len(whole)] == whole for i in range(len(text) - length))
            num_found += 1
    assert num_found > 30


class Asked(NamedTuple):
    """As much of a session as a lookup reads."""

    request: Any
    output: list[int]
    learned: Learned


def drafter_of(text: list[int], output: list[int]) -> LookupDrafter:
    request = SimpleNamespace(prompt=SimpleNamespace(tokens=text))
    drafter = LookupDrafter(cast(Session, Asked(request, output, Learned())))
    asyncio.run(drafter.start(wait=False))
    return drafter


def verdict(tokens: list[int], num_drafted: int) -> VerifyResult:
    return VerifyResult(tokens, num_drafted, len(tokens) - 1, 0, [1.0] * num_drafted, 0.0, 0.0, 1.0)


def test_a_draft_is_what_followed_and_goes_on_behind_the_output() -> None:
    output: list[int] = []
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], output)
    offer = drafter.offer(100)
    assert offer is not None and offer.known is not None and offer.max_tokens == len(offer.known) == 7
    draft = asyncio.run(drafter.propose(DraftLimits(2)))
    assert (draft.offset, draft.tokens) == (0, [4, 5])
    output += [4, 5, 6]
    drafter.observe(verdict([4, 5, 6], 2))
    draft = asyncio.run(drafter.propose(DraftLimits(drafter.offer(3).max_tokens)))  # type: ignore[union-attr]
    assert (draft.offset, draft.tokens) == (3, [7, 1, 2])


def test_a_lookup_learns_from_its_own_drafts_alone() -> None:
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [])

    def promised() -> float:
        """That the first token behind a match of three stands."""
        offer = drafter.offer(100)
        assert offer is not None and offer.known is not None
        return offer.known[0]

    before = promised()
    drafter.observe(verdict([9, 1, 2, 3], 3))  # another drafter's
    assert promised() == before
    for _ in range(20):
        asyncio.run(drafter.propose(DraftLimits(2)))
        drafter.observe(verdict([9], 2))
        drafter.observe(verdict([1, 2, 3], 2))
        promised()
    assert promised() < before / 2
