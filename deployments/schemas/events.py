"""The events of a completion while it is written, and the objects that answers carry about it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from deployments.schemas.reasoning import ReasoningFormat
from deployments.schemas.tools import CallFormat
from rapid.events import Delta, Finish, PromptToken, Statistics


class Started(NamedTuple):
    """The first event of an answer: its prompt is known, and the target begins to read it.

    ``echoed`` is the part of the prompt that is repeated before the answer. ``calls`` is the format of calls, where the
    model may call tools, and ``reasoning`` that of reasoning, where it has one. ``prompt`` is the number of the prompt
    among the request's.
    """

    prompt_tokens: int
    echoed: str = ""
    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    prompt: int = 0


class PromptScored(NamedTuple):
    """How likely the target finds the tokens of a prompt, where the request asks for it."""

    tokens: list[PromptToken]
    prompt: int = 0


# The origin of accepted tokens, by the drafter that proposed them, where it is no drafter's model.
ORIGINS = {"lookup": "lookup", "datastore": "datastore", "self": "self", "hierarchy": "self"}

# For each prompt: `Started`, `PromptScored` where that is asked for, a `Delta` a round, and a `Finish` for each choice
Event = Started | PromptScored | Delta | Finish
Events = AsyncGenerator[Event, None]


def rapid_object(statistics: Statistics) -> dict[str, Any]:
    """The `rapid` object of an answer: the statistics, rates and times rounded for reading."""
    fields = asdict(statistics)
    fields["timings_ms"] = {name: round(ms, 2) for name, ms in statistics.timings_ms.items()}
    means = {name: round(value, 4) for name, value in fields["transfer"].items()}
    fields["transfer"] = means if statistics.transfer.positions else None
    for rate in ("acceptance_rate", "mean_accepted_length"):
        value = getattr(statistics, rate)
        fields[rate] = None if value is None else round(value, 4)
    return fields


def round_object(delta: Delta, chunks: list[dict[str, float]] | None) -> dict[str, Any]:
    """The `rapid_round` object of a streamed chunk: the origin of each of a round's tokens; ``chunks`` where given."""
    accepted = min(delta.num_accepted, len(delta.tokens))
    drafted = ORIGINS.get(delta.source, "accepted")
    following = "plain" if not delta.num_drafted else "bonus" if accepted == delta.num_drafted else "recovered"
    if delta.source == "answers":
        following = "chosen"
    return {
        "source": delta.source,
        "drafted": delta.num_drafted,
        "accepted": accepted,
        "tokens": [
            {"text": text, "origin": drafted if i < accepted else following} for i, text in enumerate(delta.pieces)
        ],
        "ms": round(delta.elapsed_ms, 2),
    } | ({} if chunks is None else {"chunks": chunks})


def usage(*prompts: Sequence[Statistics]) -> dict[str, Any]:
    """OpenAI's `usage`: the prompts' tokens, how many of them were cached, and the tokens written in all choices."""
    wholes = [Statistics.of_all(choices) for choices in prompts]
    read, written = (sum(getattr(whole, count) for whole in wholes) for count in ("prompt_tokens", "emitted"))
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(whole.cached_tokens for whole in wholes)},
    }
