"""Fill in the middle: the prompt that asks a model for the text between a prefix and a suffix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rapid.errors import InvalidRequest
from rapid.text.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Marks(NamedTuple):
    """The tokens before the prefix, before the suffix, and where the middle begins."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False


_FAMILIES = (
    _Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    _Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    _Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _Marks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    _Marks("[PREFIX]", "[SUFFIX]", suffix_first=True),  # Codestral
)


def infill_prompt(tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str) -> list[int]:
    """The tokens of the prompt; what is special in ``prefix`` and ``suffix`` is text.

    Raises:
        InvalidRequest: the tokenizer has no tokens for it.
    """
    known = tokenizer.get_vocab()
    family = next((f for f in _FAMILIES if all(mark in known for mark in (f.prefix, f.suffix, f.middle) if mark)), None)
    if family is None:
        raise InvalidRequest("suffix: this model has no tokens for filling in the middle", param="suffix")
    parts = [[known[family.prefix], *_encoded(tokenizer, prefix)], [known[family.suffix], *_encoded(tokenizer, suffix)]]
    begin = [token for token in encode(tokenizer, "", add_special_tokens=True) if token == tokenizer.bos_token_id]
    first, second = reversed(parts) if family.suffix_first else parts
    return [*begin, *first, *second, *([known[family.middle]] if family.middle else [])]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return encode(tokenizer, text, add_special_tokens=False) if text else []
