"""A request for one completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rapid.datastore.search import Datastore
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to write. ``max_tokens`` None means ``default_max_tokens``, or less where the window ends.

    ``retrieval`` holds the retriever's options; `generate` passes them to the backend unchanged. With ``ignore_eos`` an
    end of sequence is written like any other token. One of ``stop_token_ids`` ends the output in any case, and its text
    is not shown. Stop strings do not apply to the first ``min_tokens`` tokens; ``logits`` makes sure that no end of
    sequence is sampled among them. With ``num_logprobs`` each token comes with its log-probability, and with those of
    that many most likely tokens. Only requests with the same ``salt`` share the keys and values of what they read. Of
    special tokens only the ``shown_tokens`` have a text. ``datastore`` holds the texts that the request may draft from;
    None: there is none.
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
    salt: str = ""
    shown_tokens: frozenset[int] = frozenset()
    datastore: Datastore | None = None
