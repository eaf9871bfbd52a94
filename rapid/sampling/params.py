"""A request's sampling parameters, and its adjustments of the logits. This module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from rapid.models.info import ModelInfo


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. A temperature of 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    Raises:
        InvalidRequest: a value is out of range; ``param`` names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)!r}", param=param)

        require(math.isfinite(self.temperature) and 0 <= self.temperature <= 10, "temperature", "between 0 and 10")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.top_k >= 0, "top_k", "0 (off) or positive")
        require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")


@dataclass(frozen=True)
class LogitParams:
    """A request's adjustments of the logits, in the order in which they are applied; the penalties are vLLM's.

    ``logit_bias`` is added to the logits of its token ids. ``repetition_penalty`` divides a positive logit and
    multiplies a negative one, for every token of the prompt or the output. ``frequency_penalty`` is subtracted once for
    each time that a token was written, ``presence_penalty`` once in all. ``grammar`` allows only tokens that may
    follow. An end of sequence and the ``stop_token_ids`` are impossible among the first ``min_tokens`` tokens.

    `on` fills in ``prompt`` and ``eos``: the drafter reads another prompt, but counts the target's.

    Raises:
        InvalidRequest: a value is out of range; ``param`` names the field.
    """

    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: str | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)!r}", param=param)

        for param in ("frequency_penalty", "presence_penalty"):
            require(-2 <= getattr(self, param) <= 2, param, "between -2 and 2")
        usable = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        require(usable, "repetition_penalty", "above 0")
        require(all(-100 <= b <= 100 for b in self.logit_bias.values()), "logit_bias", "between -100 and 100")

    def on(self, prompt: list[int], target: ModelInfo) -> LogitParams | None:
        """The parameters for both sequences of a request with this ``prompt``; None if nothing is adjusted.

        Raises:
            InvalidRequest: a biased token does not exist, the model has no end of sequence for a grammar, or every
                token is an end of sequence or a stop token.
        """
        if self == LogitParams():
            return None
        beyond = [token for token in self.logit_bias if not 0 <= token < target.vocab_size]
        if beyond:
            raise InvalidRequest(f"logit_bias: there is no token {beyond[0]} in {target.name}", param="logit_bias")
        if self.grammar is not None and not target.eos_token_ids:
            what = f"response_format: {target.name} has no end of sequence to end a grammar with"
            raise InvalidRequest(what, param="response_format")
        if self.min_tokens and len({*self.stop_token_ids, *target.eos_token_ids}) >= target.vocab_size:
            raise InvalidRequest("stop_token_ids: with min_tokens one token must be left", param="stop_token_ids")
        counted = tuple(sorted(set(prompt))) if self.repetition_penalty != 1 else ()
        return replace(self, prompt=counted, eos=tuple(sorted(target.eos_token_ids)))
