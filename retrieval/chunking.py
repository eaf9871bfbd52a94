"""Cut a document into pieces of a bounded number of tokens, losing nothing.

Pieces end at the best separator within reach: paragraph, line, sentence, clause, word, in that order, in English and in
Chinese or Japanese punctuation (the order of the code released with arXiv 2502.20330). The document is tokenised window
by window to find the offsets of its tokens: those of a whole book would take much memory. Every piece is then tokenised
alone, because the model reads it alone, and is cut again if it has more tokens alone than inside the document.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

# A cut is made after a match. Runs are matched through a lookbehind rather than as `[.!?]+\s`, which would be quadratic
# on a long run of dots.
_SEPARATORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n(?:[^\S\n]*\n)+",
        r"\n",
        r"(?<=[.!?…])[\"'”’)\]]{0,3}\s+|[。！？｡][”’」』）】]{0,3}",
        r"(?<=[,;:])[\"'”’)\]]{0,3}\s+|[，、；：—]",
        r"\s+",
    )
)

_WINDOW = 65_536  # characters


class Tokenizer(Protocol):
    """The part of a Hugging Face fast tokenizer's interface that this module uses."""

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`. Its calls for a batch leave the interpreter to other threads while they run."""
        ...


class Chunk(NamedTuple):
    """`text` is `document[start:end]`; `num_tokens` counts the tokens of `text` tokenised alone."""

    start: int
    end: int
    text: str
    num_tokens: int


def split(text: str, *, max_tokens: int, tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Cut `text` into chunks of at most `max_tokens` tokens each (no special tokens, no overlap).

    The joined chunk texts equal the text, for any string; "" has no chunks. A chunk is longer than `max_tokens` only
    when it is a single character of that many tokens (an emoji can have four). Time is near linear in the text, and
    passes as the chunks are taken.

    Raises ValueError when `max_tokens` is less than 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if tokenizer.backend_tokenizer.truncation:  # an embedder's own tokenizer has that
        tokenizer.backend_tokenizer.no_truncation()
    if tokenizer.backend_tokenizer.padding:
        tokenizer.backend_tokenizer.no_padding()
    start, length = 0, _WINDOW
    while start < len(text):
        window = text[start : start + length]
        # The last chunk of a window may end where only the window does, so the next window begins with it.
        chunks = list(_split_window(window, max_tokens, tokenizer))
        whole = chunks if start + length >= len(text) else chunks[:-1]
        for chunk in whole:
            yield Chunk(start + chunk.start, start + chunk.end, chunk.text, chunk.num_tokens)
        start += whole[-1].end if whole else 0
        length = _WINDOW if whole else 2 * length


def _split_window(text: str, max_tokens: int, tokenizer: Tokenizer) -> Iterator[Chunk]:
    # Tokenizers refuse lone surrogates, which JSON can contain. For counting, "?" replaces each of them.
    readable = text.encode("utf-8", "replace").decode("utf-8")
    spans = _token_spans(readable, tokenizer)
    start = first = 0  # `first` is the first token that reaches beyond `start`
    while start < len(text):
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        end, num_tokens = _next_cut(readable, start, spans, first, max_tokens, tokenizer)
        yield Chunk(start, end, text[start:end], num_tokens)
        start = end


def _next_cut(
    text: str, start: int, spans: list[tuple[int, int]], first: int, max_tokens: int, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Return where the chunk that begins at `start` ends, and how many tokens it has."""
    budget, limit = max_tokens, len(text)
    while True:
        last = first + max(budget, 1) - 1
        if last + 1 < len(spans):
            limit = min(limit, max(spans[last][1], start + 1))
        end = limit if limit == len(text) else _best_separator(text, start, limit)
        num_tokens = _num_tokens(text[start:end], tokenizer)
        if num_tokens <= max_tokens or end == start + 1:
            return end, num_tokens
        # The piece has more tokens alone than within the document, so try again with that many tokens fewer. A piece
        # that is one token of the document and still too long is halved until it fits.
        budget = bisect_left(spans, (end, 0)) - first - (num_tokens - max_tokens)
        limit = end - 1 if budget >= 1 else start + (end - start) // 2


def _best_separator(text: str, start: int, limit: int) -> int:
    """Return the best cut in the later half of text[start:limit] (earlier cuts make small chunks), or `limit`."""
    middle = start + (limit - start) // 2
    for separator in _SEPARATORS:
        end = 0
        for match in separator.finditer(text, middle, limit):
            end = match.end()
        if end:
            return end
    return limit


def _token_spans(text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    [encoding] = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
    spans: list[tuple[int, int]] = encoding.offsets
    return spans


def _num_tokens(text: str, tokenizer: Tokenizer) -> int:
    [encoding] = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return len(encoding)
