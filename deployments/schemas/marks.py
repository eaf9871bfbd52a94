"""Marks in a model's text: what stands around its calls and its reasoning. Some models have special tokens for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERMES, HERMES_END = "<tool_call>", "</tool_call>"  # Qwen, Hermes
MISTRAL, MISTRAL_ARGS = "[TOOL_CALLS]", "[ARGS]"
REASONING = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen3, QwQ, SmolLM3, GLM
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("◁think▷", "◁/think▷"),  # Kimi
)
_ALL = frozenset([HERMES, HERMES_END, MISTRAL, MISTRAL_ARGS, *(mark for pair in REASONING for mark in pair)])


def special_marks(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """The marks that are special tokens of the model, whose text would not be shown: mark → token."""
    added = tokenizer.added_tokens_decoder
    return {token.content: i for i, token in added.items() if token.special and token.content in _ALL}
