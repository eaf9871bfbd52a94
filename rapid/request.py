"""One completion as it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to write. ``max_tokens`` None means ``default_max_tokens``, or less where the window ends.

    ``retrieval`` holds the retriever's options; they are passed on to the backend as they are. With ``ignore_eos`` an
    end of sequence is written like any other token; one of ``stop_token_ids`` ends the output all the same, unseen. The
    first ``min_tokens`` are not looked through for stop strings; that no end is drawn among them, ``logits`` say. With
    ``num_logprobs`` each token comes with its log-probability, and those of that many most likely ones.
    """

    prompt: Prompt
    sampling: SamplingParams
    speculation: SpeculationParams
    retrieval: Any = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    default_max_tokens: int = 512
    logits: LogitParams = field(default_factory=LogitParams)
    ignore_eos: bool = False
    num_logprobs: int | None = None
