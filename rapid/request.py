"""One completion: what is asked for, what comes back, and what is counted on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rapid.errors import InvalidRequest
from rapid.sampling.logits_processor import LogitParams
from rapid.sampling.sampler import SamplingParams
from rapid.speculation.verification import RULES
from rapid.strategies import STRATEGIES
from rapid.text.prompts import Prompt


@dataclass(frozen=True)
class SpeculationParams:
    """How one request decodes. γ is ``num_draft_tokens``, η is ``transfer_strength`` (paper §3 and §4.1).

    γ "auto" is chosen every round from measured costs and acceptance (`rapid.speculation.controller`), 0 included; a number is drafted
    every round by the drafter, and looked up where there is none. ``rag_model``: whose weights the strategy "rag" uses.

    Raises:
        InvalidRequest: a value is unknown or out of range; ``param`` names the field.
    """

    strategy: str = "rapid"
    num_draft_tokens: int | Literal["auto"] = "auto"
    transfer_strength: float = 10.0
    verification: str = "published"
    draft_top_k: int = 64
    rag_model: str = "target"

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)!r}", param=f"rapid.{param}")

        gamma = self.num_draft_tokens
        require(self.strategy in STRATEGIES, "strategy", f"one of {', '.join(STRATEGIES)}")
        require(
            gamma == "auto" or (isinstance(gamma, int) and 0 <= gamma <= 64),
            "num_draft_tokens",
            '"auto" or between 0 and 64',
        )
        require(0 <= self.transfer_strength <= 1000, "transfer_strength", "between 0 and 1000")
        require(self.verification in RULES, "verification", f"one of {', '.join(RULES)}")
        require(1 <= self.draft_top_k <= 4096, "draft_top_k", "between 1 and 4096")
        require(self.rag_model in ("target", "drafter"), "rag_model", "target or drafter")

    @property
    def fixed_draft_tokens(self) -> int | None:
        """γ where it is given, None where it is chosen."""
        return None if self.num_draft_tokens == "auto" else self.num_draft_tokens


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
