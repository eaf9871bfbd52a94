"""Fields of other servers' APIs that have no effect here: clients send them by default, or with every request.

A field with `ANY` has no effect on any answer. Another field is accepted at the values under which it asks for nothing,
and refused by name at all others. What was ignored is named in the answer's `rapid` object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

ANY: Sequence[Any] = ()
Ignorable = Mapping[str, Sequence[Any]]  # name → the values at which the field asks for nothing, or `ANY`

NOTHING: Ignorable = MappingProxyType({})

# OpenAI's: what is stored, billed, cached and looked at elsewhere
_OPENAI: Ignorable = {
    "metadata": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "safety_identifier": ANY,
    "service_tier": ANY,
    "store": ANY,
}
# vLLM's, llama.cpp's and others': samplers that are off, and details of how they serve
_SERVERS: Ignorable = {
    "cache_prompt": ANY,
    "id_slot": ANY,
    "priority": ANY,
    "request_id": ANY,
    "spaces_between_special_tokens": ANY,
    "dry_multiplier": [0],
    "dynatemp_range": [0],
    "early_stopping": [False],
    "include_stop_str_in_output": [False],
    "length_penalty": [1],
    "mirostat": [0],
    "repeat_penalty": [1],
    "skip_special_tokens": [True],
    "tfs_z": [1],
    "top_a": [0],
    "typical_p": [1],
    "use_beam_search": [False],
    "xtc_probability": [0],
}
COMPLETION: Ignorable = {**_OPENAI, **_SERVERS}
CHAT: Ignorable = {
    **COMPLETION,
    "prediction": ANY,  # a guess at the answer, which makes it faster or not
    "reasoning_effort": ANY,
    "verbosity": ANY,
    "best_of": [1],
    "include_reasoning": [True],
    "modalities": [["text"]],
}
TEXT: Ignorable = COMPLETION
EMBEDDINGS: Ignorable = _OPENAI
STREAM_OPTIONS: Ignorable = {"include_obfuscation": ANY}
# What servers put into their answers, and chat interfaces into their histories
MESSAGE: Ignorable = {
    "annotations": ANY,
    "audio": ANY,
    "cache_control": ANY,
    "created_at": ANY,
    "id": ANY,
    "opts": ANY,
    "status": ANY,
    "timestamp": ANY,
}
PART: Ignorable = {"annotations": ANY, "cache_control": ANY, "id": ANY}
TOOL: Ignorable = {"cache_control": ANY}
TOOL_CALL: Ignorable = {"index": ANY}
# Anthropic's
BLOCK: Ignorable = {**PART, "citations": ANY}
THINKING_OPTION: Ignorable = {"budget_tokens": ANY}
THINKING: Ignorable = {"data": ANY, "signature": ANY, "thinking": ANY}
OUTPUT_CONFIG: Ignorable = {"effort": ANY}
MESSAGES: Ignorable = {"container": ANY, "metadata": ANY, "service_tier": ANY}
# Of OpenAI's Responses
RESPONSES: Ignorable = {
    **{name: ANY for name in _OPENAI if name not in ("metadata", "store")},
    "background": [False],
    "include": ANY,
    "max_tool_calls": ANY,
    "reasoning": ANY,
    "top_logprobs": [0],
    "truncation": ["disabled"],
}
ITEM: Ignorable = {"id": ANY, "status": ANY}
ITEM_PART: Ignorable = {"annotations": ANY, "logprobs": ANY}
REASONING_ITEM: Ignorable = {"content": ANY, "encrypted_content": ANY, "id": ANY, "status": ANY, "summary": ANY}
TEXT_OPTIONS: Ignorable = {"verbosity": ANY}


def fault(field: str, value: Any, neutral: Sequence[Any]) -> str | None:
    """Why ``value`` of an ignored ``field`` would have an effect, in words; None where it has none."""
    # In Python True is 1, which in JSON it is not.
    if neutral is ANY or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        return None
    return f"only {' or '.join(map(repr, neutral))} is served here"
