"""The messages between a request and an engine: for each call of a lease, one message each way.

Messages cross process boundaries, and processes that hold no model read them, so this module does not import torch.
Positions count output tokens. ``offset`` is the number of output tokens that the sender has, so a lost or doubled token
is an error and never a wrong text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from rapid.kv_cache.stats import PoolStats
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import NO_DOUBT, Draft, DraftLimits, Trust
from rapid.speculation.params import SpeculationParams

_PASS_FACTOR = 10.0  # above what is expected: other processes may take the cores
_UNKNOWN_PASS_S = 60.0


@dataclass(frozen=True)
class SequenceRequest:
    """A request for a sequence: room for ``prompt`` and ``max_new_tokens``, and the way it samples.

    The last ``written`` tokens of the prompt are output already: another engine wrote them, and this sequence
    continues. With ``may_wait`` False the request gets room at once or fails. With ``num_logprobs`` each written token
    comes with its log-probability, and with those of that many most likely tokens. ``speculation`` holds for every
    draft and every verification of the sequence. ``known`` are tokens that drafts should be able to have, beside those
    of the prompt, the likeliest first. Only sequences with the same ``salt`` share keys and values.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    written: int = 0
    may_wait: bool = True
    logits: LogitParams | None = None
    num_logprobs: int | None = None
    known: tuple[int, ...] = ()
    salt: str = ""

    @property
    def capacity(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    def after(self, output: list[int]) -> SequenceRequest:
        """The same request once ``output`` has been written.

        The seed stays. Random numbers go by the position in the output, so those that led to ``output`` do not come
        again, and another engine writes what this one would have written.
        """
        return replace(
            self,
            prompt=self.prompt + output,
            max_new_tokens=self.max_new_tokens - len(output),
            written=self.written + len(output),
        )


@dataclass(frozen=True)
class PrefillResult:
    """``cached_tokens`` of the prompt were in the engine's cache; the prefill of the rest took ``elapsed_ms``."""

    cached_tokens: int
    elapsed_ms: float

    def attributes(self) -> dict[str, Any]:
        return {"rapid.cached_tokens": self.cached_tokens}


@dataclass(frozen=True)
class DraftRequest:
    """Asks for a draft within ``limits`` after the output, whose tokens from ``offset`` on are ``tokens``.

    With ``round_start`` the last of ``tokens`` are drafted themselves, and the round began at that output position.
    """

    offset: int
    tokens: list[int]
    limits: DraftLimits
    round_start: int | None = None

    def attributes(self) -> dict[str, Any]:
        return {"rapid.offset": self.offset + len(self.tokens), "rapid.max_tokens": self.limits.max_tokens}


@dataclass(frozen=True)
class CacheView:
    """Some of a target's own pages, about ``num_tokens`` in all, chosen by ``kind`` (`rapid.engine.page_ranking`)."""

    kind: Literal["window", "snap", "chunks"]
    num_tokens: int


@dataclass(frozen=True)
class SelfDraftRequest:
    """Asks the target for a draft within ``limits`` over ``view``; the sender has ``offset`` output tokens."""

    offset: int
    limits: DraftLimits
    view: CacheView

    def attributes(self) -> dict[str, Any]:
        return {"rapid.offset": self.offset, "rapid.max_tokens": self.limits.max_tokens}


@dataclass(frozen=True)
class RefineRequest:
    """Asks the target to verify ``draft`` over ``view``; the tokens ``drafted`` lie between output and ``draft``."""

    draft: Draft
    drafted: list[int]
    view: CacheView

    def attributes(self) -> dict[str, Any]:
        return {"rapid.offset": self.draft.offset, "rapid.drafted": len(self.draft.tokens)}


@dataclass(frozen=True)
class VerifyRequest:
    """Asks to verify ``draft``: by the sequence's rule and η if ``transfers``, else losslessly (the output is p).

    If the sequence transfers everywhere, each token is chosen with a q. So the draft's last token is not scored: its q
    is that of the position behind the tokens before it. ``trust`` bounds η where it is "auto".
    """

    draft: Draft
    transfers: bool = False
    trust: Trust = NO_DOUBT

    def attributes(self) -> dict[str, Any]:
        return {"rapid.transfers": self.transfers}


@dataclass(frozen=True)
class ScoreRequest:
    """Asks how probable ``tokens`` are behind the prompt, and how that many most likely tokens are in their places."""

    tokens: list[int]
    num_top: int = 0

    def attributes(self) -> dict[str, Any]:
        return {"rapid.scored": len(self.tokens)}


@dataclass(frozen=True)
class ScoreResult:
    """``logprobs[i]`` is the natural log-probability of token i, given the prompt and the tokens before it.

    It is that of the model itself: nothing is warped or adjusted. ``ranks[i]`` counts from 1, the likeliest, and
    ``top[i]`` holds (token, log-probability) of the likeliest, in order.
    """

    logprobs: list[float]
    ranks: list[int]
    top: list[list[tuple[int, float]]]

    def attributes(self) -> dict[str, Any]:
        return {}


class Pulse(NamedTuple):
    """How long an engine's current pass has been running, and how long it was expected to, in seconds.

    ``pass_age_s`` is 0 between passes. ``expected_s`` follows from the tokens in the pass and what such passes took
    lately (`rapid.engine.pacing.Pacer`). It is None for a new engine's first passes, for the first that reads a prompt,
    and for one that compiles kernels.
    """

    pass_age_s: float
    expected_s: float | None

    def is_stuck(self, patience_s: float) -> bool:
        """Whether the pass will hardly end: older than ``patience_s``, and than ten times the expected.

        One of which nothing is expected gets a minute.
        """
        most_s = _UNKNOWN_PASS_S if self.expected_s is None else _PASS_FACTOR * self.expected_s
        return self.pass_age_s > max(patience_s, most_s)

    def problem(self, patience_s: float) -> str | None:
        """`is_stuck` in words."""
        return f"stuck in one pass for {self.pass_age_s:.1f} s" if self.is_stuck(patience_s) else None


class EngineStats(NamedTuple):
    """A snapshot. ``kv_bytes`` is the memory of the ``num_sequences`` open sequences; ``kv`` has all counts.

    ``out_of_memory`` counts passes for which the device had no memory; they were tried again in parts.
    ``host_waits`` counts how often the engine's thread waited for its device to read results.
    """

    num_sequences: int
    num_waiting: int
    kv_bytes: int
    kv: PoolStats
    out_of_memory: int
    forward_passes: int
    tokens_processed: int
    host_waits: int
    pulse: Pulse
