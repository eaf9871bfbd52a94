"""What followed the last time is found, by the longest match."""

import random

import pytest

from rapid.drafters.lookup import NGRAM, Lookup


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
