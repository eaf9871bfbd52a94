"""Finding how texts went on, against a search of every place of every text."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from rapid.datastore import search
from rapid.datastore.search import CONTINUATION, LONGEST_MATCH, SEPARATOR, SHORTEST_MATCH, Datastore, Segment

Texts = list[list[int]]


def segment(texts: Texts) -> Segment:
    tokens = np.array([token for text in texts for token in [*text, SEPARATOR]], np.uint32)
    return Segment(tokens, search.suffix_array(tokens))


def searched(texts: Texts, tail: list[int]) -> tuple[int, list[list[int]]]:
    """(length of the longest match, what followed each of its places, up to the end of its text)."""
    for length in range(min(LONGEST_MATCH, len(tail)), SHORTEST_MATCH - 1, -1):
        behind = [
            text[at + length : at + length + CONTINUATION]
            for text in texts
            for at in range(len(text) - length + 1)
            if text[at : at + length] == tail[-length:]
        ]
        if behind:
            return length, behind
    return 0, []


def chain(behind: list[list[int]]) -> tuple[list[int], list[float]]:
    tokens: list[int] = []
    shares: list[float] = []
    for i in range(CONTINUATION):
        counts = Counter(each[i] if i < len(each) else SEPARATOR for each in behind)
        token = min(counts, key=lambda token: (-counts[token], token))
        if token == SEPARATOR:
            break
        tokens.append(token)
        shares.append(counts[token] / (len(behind) + 1))
        behind = [each for each in behind if each[i : i + 1] == [token]]
    return tokens, shares


@pytest.mark.parametrize("vocabulary", [2, 5, 70_000])  # the last needs more than 16 bits
def test_the_longest_match_and_its_best_chain_are_those_of_a_search_of_every_place(vocabulary: int) -> None:
    rng = random.Random(vocabulary)
    num_found = 0
    for _ in range(200):
        alphabet = [rng.randrange(vocabulary) for _ in range(4)]
        texts = [[rng.choice(alphabet) for _ in range(rng.randint(0, 60))] for _ in range(rng.randint(1, 6))]
        border = rng.randint(0, len(texts))
        datastore = Datastore([segment(part) for part in (texts[:border], texts[border:]) if part])
        tail = [rng.choice(alphabet) for _ in range(rng.randint(0, 20))]
        if rng.random() < 0.5 and len(texts[0]) > 4:  # a match that is as long as any
            tail = texts[0][: rng.randint(2, len(texts[0]))]
        length, behind = searched(texts, tail)
        found = datastore.find(tail)
        if not length:
            assert found is None
            continue
        assert found is not None and found.length == length
        assert (found.tokens, found.shares) == chain(behind)
        num_found += 1
    assert num_found > 150


def test_no_match_crosses_the_border_of_two_texts() -> None:
    datastore = Datastore([segment([[1, 2], [3, 4, 5]])])
    assert datastore.find([2, 3]) is None
    found = datastore.find([1, 2])
    assert found is not None and found.tokens == []  # its text ends there


def test_of_too_many_matches_those_looked_at_are_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suffixes are in order, so that the first of them would be those that go on with the smallest tokens."""
    texts = [[1, 2, 3]] * 30 + [[1, 2, 4]] * 70
    monkeypatch.setattr(search, "MAX_MATCHES", 10)
    found = Datastore([segment(texts)]).find([1, 2])
    assert found is not None and found.tokens == [4]
    assert found.shares == [7 / 11]


def test_a_datastore_without_texts_finds_nothing() -> None:
    assert Datastore([]).find([1, 2, 3]) is None
    assert Datastore([segment([[1, 2, 3]])]).find([2]) is None  # shorter than the shortest match
