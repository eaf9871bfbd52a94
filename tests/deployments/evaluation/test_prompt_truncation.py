"""What is cut off: the middle of a prompt, as the benchmarks do, and documents into parts."""

import re

import pytest
from words import Words

from deployments.evaluation.truncation import Document, evidence_kept, most, parts, prompt, without_middle


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (10, "a b c d e f g h i j"),
        (4, "a b i j"),
        (5, "a b h i j"),  # tokens[:5 // 2] and tokens[-5 // 2:], as the scripts of LongBench v2 and ∞Bench write it
        (1, " j"),
    ],
)
def test_the_first_and_the_last_half_are_kept(limit, kept):
    letters = "a b c d e f g h i j"
    assert without_middle(letters, Words(), limit) == kept
    tokens = Words().encode(letters)
    assert len(tokens[: limit // 2] + tokens[-limit // 2 :]) == limit


def test_the_whole_prompt_is_cut_and_the_whole_document_kept_beside_it():
    made = prompt("Read. ", "one two three four", " Question?", Words(), 4)
    assert made.messages == ({"role": "user", "content": "Read. one four Question?"},)
    assert made.whole == "one two three four"
    assert prompt("Read. ", "one two", " Question?", Words(), 4).whole == ""


@pytest.mark.parametrize(("bound", "found"), [(7, 7), (0, 1), (99, 20), (1, 1)])
def test_the_most_that_fits(bound, found):
    assert most(lambda n: n <= bound, 1, 20) == found


def test_little_more_than_the_result_is_tried():
    tried = []
    assert most(lambda n: tried.append(n) or n <= 100, 1, 1 << 30) == 100
    assert max(tried) < 200 and len(tried) < 20


def test_parts_overlap_by_half_and_cover_everything():
    assert parts([1] * 10, 4) == [range(0, 4), range(2, 6), range(4, 8), range(6, 10)]
    assert parts([3, 9, 3], 5) == [range(0, 1), range(1, 2), range(2, 3)]  # a piece above the room stands alone
    assert parts([1, 2], 10) == [range(0, 2)]
    assert parts([0, 0, 5, 0], 4) == [range(0, 2), range(1, 2), range(2, 3), range(3, 4)]
    for sizes in ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 5, [0] * 7):
        found = parts(sizes, 12)
        assert {i for part in found for i in part} == set(range(len(sizes)))
        assert all(sum(sizes[i] for i in part) <= 12 for part in found)


def test_a_document_is_read_where_its_evidence_is():
    # A piece has two tokens, the first with the end of the line before it.
    document = Document(["a a", "b b", "c c", "d d", "e e"], "\n", Words())
    assert document.read(document.part_with([3], 4)) == "c c\nd d"
    assert document.part_with([0], 4) == document.part_with([1], 4) == range(0, 2)
    assert document.part_with([], 4) == range(0, 2)
    assert document.part_with([0, 3, 4], 4) == range(3, 5)
    assert document.part_with([0, 3, 4], 100) == range(0, 5)


class LineFeeds:
    """As in GPT-2's rule, a line feed is a token, but those at the end of a text are one; so are the words."""

    def encode(self, text):
        return re.findall(r"\n+$|\n|[^\s]+", text)

    def decode(self, tokens):
        return "".join(tokens)


def test_a_part_has_no_more_tokens_than_its_room_whatever_joins_its_pieces():
    document = Document([f"w{i}" for i in range(20)], "\n\n", LineFeeds())
    for i in range(20):
        assert len(LineFeeds().encode(document.read(document.part_with([i], 12)))) <= 12


def test_evidence_kept():
    assert [evidence_kept(texts, "a b c") for texts in (["a", "c"], ["a", "x"], ["x"], [])] == [
        "all",
        "some",
        "none",
        "unknown",
    ]
