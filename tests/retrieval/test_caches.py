"""Where texts were cut lately."""

from __future__ import annotations

import pytest

from retrieval.caches import CutCache
from retrieval.chunking import split

TEXT = "The whale is a mammal. It breathes air! Does it? " * 40


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.read = tokenizer, 0

    @property
    def backend_tokenizer(self) -> Counting:
        return self

    def encode_batch(self, texts: list[str], **options):
        self.read += sum(map(len, texts))
        return self._tokenizer.backend_tokenizer.encode_batch(texts, **options)

    def __getattr__(self, name: str):
        return getattr(self._tokenizer.backend_tokenizer, name)


@pytest.fixture
def counting(tokenizer) -> Counting:
    return Counting(tokenizer)


def read(cache: CutCache, counting: Counting, text: str, max_tokens: int = 20, salt: str = "") -> bool:
    """Whether the text had to be tokenised; it is cut as without a cache."""
    before = counting.read
    assert list(cache.split(text, max_tokens, salt)) == list(
        split(text, max_tokens=max_tokens, tokenizer=counting._tokenizer)
    )
    return counting.read > before


def test_a_text_is_tokenised_once_for_each_size_and_salt(counting):
    cache = CutCache(counting)
    for size, salt in ((20, ""), (30, ""), (20, "a"), (20, "b")):
        assert [read(cache, counting, TEXT, size, salt) for _ in range(2)] == [True, False]


def test_the_texts_used_least_recently_are_forgotten(counting):
    num = len(list(split(TEXT, max_tokens=20, tokenizer=counting._tokenizer)))
    cache = CutCache(counting, size=2 * num + 2)
    first, second, third = (TEXT + end for end in "abc")
    assert [read(cache, counting, text) for text in (first, second, first, third)] == [True, True, False, True]
    assert [read(cache, counting, text) for text in (first, third)] == [False, False]
    assert read(cache, counting, second)


def test_a_text_that_was_left_unread_is_not_remembered(counting):
    cache = CutCache(counting)
    left = cache.split(TEXT, 20)
    next(left)
    left.close()
    assert read(cache, counting, TEXT)


def test_no_chunk_is_shorter_than_a_token(counting):
    with pytest.raises(ValueError, match="at least 1"):
        list(CutCache(counting).split(TEXT, 0))
