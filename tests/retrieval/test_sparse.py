from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from retrieval.sparse import bm25_passages, bm25_query, terms
from retrieval.store import ChunkStore
from retrieval.vectors import ChunkVectors, Query


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Captain's ships", ["the", "capta", "s", "ships"]),
        ("ＦＵＬＬ width, 1234567 and x2", ["full", "width", "1234567", "and", "x2"]),
        ("黑豹队的防守", ["黑豹", "豹队", "队的", "的防", "防守"]),
        ("東", ["東"]),
        ("iPhone手机很好", ["iphon", "手机", "机很", "很好"]),
        ("カタカナとひらがな", ["カタ", "タカ", "カナ", "ナと", "とひ", "ひら", "らが", "がな"]),
        ("학교에서", ["학교", "교에", "에서"]),
        ("हिन्दी में", ["हिन्द", "में"]),
        ("Größe", ["gröss"]),
        ("— … ?!", []),
        ("", []),
    ],
)
def test_terms_in_any_script(text, expected):
    assert terms(text) == expected


@pytest.mark.parametrize(
    ("query", "passage"),
    [
        ("running", "he runs: nothing is runni ng"),
        ("Wer leitet die Prüfung?", "Die Prüfungen sind schwer"),
        ("防守丢了多少分", "黑豹队的防守只丢了 308分"),
        ("학교는 어디", "우리 학교에서"),
    ],
)
def test_a_query_and_a_passage_share_terms(query, passage):
    assert set(terms(query)) & set(terms(passage))


def test_a_lone_surrogate_is_a_term_like_others():
    assert len(bm25_query("whale \ud800").indices) >= 1


TEXTS = ["a white whale and a ship", "the ship sails", "whale whale whale", "no such thing here at all", "..."]


def test_qdrants_scores_are_bm25s():
    """Held to the formula of Robertson and Zaragoza (2009), with IDF ln(1 + (N − n + ½) / (n + ½))."""
    store = ChunkStore(dimension=2)
    dense = np.ones((len(TEXTS), 2), dtype=np.float32)
    store.add("me", ChunkVectors(dense, dense, bm25_passages(TEXTS)))
    hits = store.search(["me"], Query(None, bm25_query("white whale ship")), limit=10)
    counts = [Counter(terms(text)) for text in TEXTS]
    mean = sum(count.total() for count in counts) / len(counts)
    expected = {}
    with_terms = [count for count in counts if count]  # Qdrant counts the points that have the vector
    for i, count in enumerate(counts):
        score = 0.0
        for term in ("white", "whale", "ship"):
            n = sum(term in each for each in counts)
            idf = math.log(1 + (len(with_terms) - n + 0.5) / (n + 0.5))
            tf = count[term]
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * count.total() / mean))
        if score:
            expected["me", i] = score
    assert hits.scores == pytest.approx(expected, rel=1e-4)
    assert list(hits.ranking) == sorted(expected, key=lambda place: -expected[place])
