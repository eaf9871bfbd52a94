from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest

from retrieval import split

ALPHABETS = {
    "english": "abc dEf. ,;:!?\n\"')",
    "chinese": "天地玄黄。！？；，、：」 \n",
    "emoji": "👩\u200d👧🏽🇨🇭e\u0301\ufe0f x",
    "blank": " \t\r\n\u3000\u00a0\u2028",
    "rare": "\U00020000\U0010fffd\x00\x7f\ufffd<|>",
    "lone surrogates": "\ud800\udc00a \udfff",
}


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    alphabets = [*ALPHABETS.values(), "".join(ALPHABETS.values())]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(0, 300))) for _ in range(count)]


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text.encode("utf-8", "replace").decode(), add_special_tokens=False)["input_ids"])


def check(text: str, max_tokens: int, tokenizer) -> None:
    chunks = list(split(text, max_tokens=max_tokens, tokenizer=tokenizer))
    assert "".join(chunk.text for chunk in chunks) == text
    for chunk in chunks:
        assert chunk.text and chunk.text == text[chunk.start : chunk.end]
        assert chunk.num_tokens == count(tokenizer, chunk.text)
        assert chunk.num_tokens <= max_tokens or len(chunk.text) == 1


@pytest.mark.parametrize("which", ["tokenizer", "trimming_tokenizer"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 40])
def test_nothing_is_lost_and_no_chunk_is_too_long_for_any_string(which, max_tokens, request):
    for text in random_texts(seed=max_tokens, count=60):
        check(text, max_tokens, request.getfixturevalue(which))


def test_bounds_hold_on_prose_for_every_tokenizer(prose, tokenizer, trimming_tokenizer):
    for each in (tokenizer, trimming_tokenizer):
        check(prose[:20_000], 64, each)
        check(prose[:20_000], 500, each)


def test_bounds_hold_for_a_tokenizer_with_unknown_words(minilm, prose):
    from transformers import AutoTokenizer

    wordpiece = AutoTokenizer.from_pretrained(minilm)
    check(prose[:10_000], 64, wordpiece)
    for text in random_texts(seed=0, count=60):
        check(text, 5, wordpiece)


def test_empty_text_has_no_chunks_and_a_short_one_is_one_chunk(tokenizer):
    assert list(split("", max_tokens=8, tokenizer=tokenizer)) == []
    assert [chunk.text for chunk in split("One line.\n\nTwo.", max_tokens=100, tokenizer=tokenizer)] == [
        "One line.\n\nTwo."
    ]


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_chunk_has_at_least_one_token(max_tokens, tokenizer):
    with pytest.raises(ValueError, match="max_tokens"):
        list(split("text", max_tokens=max_tokens, tokenizer=tokenizer))


class CharacterTokenizer:
    """One token a character, so that a test can say where a window ends."""

    truncation = padding = None

    @property
    def backend_tokenizer(self):
        return self

    def encode_batch(self, texts, *, add_special_tokens):
        return [SimpleNamespace(offsets=[(i, i + 1) for i in range(len(text))]) for text in texts]

    def encode_batch_fast(self, texts, *, add_special_tokens):
        return texts


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaaaaaaaaaaaaa\n\nbb\nc. d, e f ggggg", "aaaaaaaaaaaaaaa\n\n"),
        ("aaaaaaaaaaaaaaa bbb\nc. d, e f gggggggg", "aaaaaaaaaaaaaaa bbb\n"),
        ("aaaaaaaaaaaaaaa bbb c.) d, e f gggggggg", "aaaaaaaaaaaaaaa bbb c.) "),
        ("aaaaaaaaaaaaa 3.14 c; d1,2 f ggggggggg", "aaaaaaaaaaaaa 3.14 c; "),
        ("aaaaaaaaaaaaaaa bbb c d e ffffffffffff", "aaaaaaaaaaaaaaa bbb c d e "),
        ("天地玄黄宇宙洪荒日月盈昃「辰宿。」列张，寒来暑往秋收冬藏闰余成岁", "天地玄黄宇宙洪荒日月盈昃「辰宿。」"),
        ("天地玄黄宇宙洪荒日月盈昃辰宿列张，寒来暑往秋收冬藏闰余成岁", "天地玄黄宇宙洪荒日月盈昃辰宿列张，"),
        ("a" * 40, "a" * 28),
    ],
    ids=["paragraph", "line", "sentence", "clause", "word", "chinese sentence", "chinese clause", "hard"],
)
def test_a_cut_is_made_at_the_best_separator_in_reach(text, first):
    assert next(split(text, max_tokens=28, tokenizer=CharacterTokenizer())).text == first


def test_an_early_separator_does_not_make_a_tiny_chunk():
    chunks = list(split("a\n\n" + "b" * 60, max_tokens=28, tokenizer=CharacterTokenizer()))
    assert [len(chunk.text) for chunk in chunks] == [28, 28, 7]


def test_chunks_of_prose_are_mostly_full(prose, tokenizer):
    chunks = list(split(prose, max_tokens=256, tokenizer=tokenizer))
    assert sum(chunk.num_tokens for chunk in chunks[:-1]) > 0.6 * 256 * (len(chunks) - 1)


@pytest.mark.parametrize("window", [200, 1000, 5000])
def test_windows_change_nothing_and_bound_what_is_tokenised_at_once(prose, tokenizer, monkeypatch, window):
    """A chunk of 256 tokens is longer than the smallest window here, which then grows."""
    longest = 0

    class Watched(CharacterTokenizer):
        def encode_batch(self, texts, **how):
            nonlocal longest
            longest = max(longest, len(texts[0]))
            return tokenizer.backend_tokenizer.encode_batch(texts, **how)

        def encode_batch_fast(self, texts, **how):
            return tokenizer.backend_tokenizer.encode_batch_fast(texts, **how)

    whole = list(split(prose[:20_000], max_tokens=256, tokenizer=tokenizer))
    monkeypatch.setattr("retrieval.chunking._WINDOW", window)
    assert list(split(prose[:20_000], max_tokens=256, tokenizer=Watched())) == whole
    assert longest <= max(window, 3200)


def test_a_character_longer_than_a_chunk_stays_whole(tokenizer):
    chunks = list(split("🦑🦑", max_tokens=1, tokenizer=tokenizer))
    assert [chunk.text for chunk in chunks] == ["🦑", "🦑"]
    assert all(chunk.num_tokens > 1 for chunk in chunks)


@pytest.mark.parametrize("unit", ["\n", " ", "a", ".", "天", "one two, three. "])
def test_time_is_near_linear(unit, tokenizer):
    """A window must not be searched again and again, nor a run of one character be quadratic in a pattern."""

    def seconds(length: int) -> float:
        text, took = (unit * length)[:length], []
        for _ in range(3):
            began = time.process_time()
            list(split(text, max_tokens=200, tokenizer=tokenizer))
            took.append(time.process_time() - began)
        return min(took)

    seconds(1_000)
    assert seconds(160_000) < 64 * max(seconds(10_000), 0.005)  # linear is 16 times, quadratic 256
