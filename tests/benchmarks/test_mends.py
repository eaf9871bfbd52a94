"""The table of mends names lines and tests that are there."""

from __future__ import annotations

import re

from benchmarks.mends import ROOT, mends


def test_every_mend_stands_where_the_table_says() -> None:
    for mend in mends():
        assert (ROOT / mend.file).read_text(encoding="utf-8").count(mend.lines) == 1, mend.kind
        assert mend.lines != mend.without


def test_every_mend_has_its_test() -> None:
    for mend in mends():
        file, _, name = mend.test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(async )?def {name}\b", text, re.MULTILINE), mend.test
