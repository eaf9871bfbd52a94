from __future__ import annotations

import pytest

from benchmarks.common.passages import documents
from benchmarks.common.results import DATA


@pytest.mark.skipif(not (DATA / "qmsum_test.jsonl").is_file(), reason="the data is not here")
def test_gold_is_a_piece_of_its_document() -> None:
    some = list(documents())
    counts = {source: sum(len(d.questions) for d in some if d.source == source) for source in {d.source for d in some}}
    assert counts["qmsum"] == 244 and counts["xquad_en"] == counts["xquad_zh"] == 1190 and counts["loogle"] > 60
    for document in some:
        for asked in document.questions:
            assert asked.gold and asked.question.strip()
            assert all(0 <= start < end <= len(document.text) for start, end in asked.gold)
    english = next(document for document in some if document.source == "xquad_en")
    [(start, end)] = english.questions[0].gold
    assert english.text[start:end] == "308"
