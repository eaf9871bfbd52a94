"""How one request speculates: the options that a client may set, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from rapid.errors import InvalidRequest
from rapid.models.draft_vocabulary import Size
from rapid.sampling.params import SamplingParams
from rapid.strategies import STRATEGIES, VERIFICATION_RULES

NUM_ANSWER_CHUNKS = 10  # the strategy "speculative_rag" drafts from so many of the best chunks


@dataclass(frozen=True)
class SpeculationParams:
    """How one request decodes. γ is ``num_draft_tokens``, η is ``transfer_strength`` (paper §3 and §4.1).

    With γ "auto" the controller chooses γ every round from measured costs and acceptance
    (`rapid.speculation.controller`); the choice may be 0. With a number, the first drafter of the strategy that has an
    offer drafts that many tokens every round. A drafter model draws from about ``draft_vocabulary`` tokens
    (`rapid.models.draft_vocabulary`). ``rag_model`` names the role whose weights the strategy "rag" uses.
    ``num_answers`` and ``num_clusters`` are m and k of the strategy "speculative_rag".

    ``draft_cache_tokens`` is how many tokens of its own cache the target reads when it drafts itself; ``draft_cache``
    says which: a window, or those that the prompt's end attends to.

    With ``refresh`` "auto" the passages are retrieved anew at the end of a sentence that they did not help with.

    With η "auto" each position has its own, the largest that keeps KL(p̂‖p) within a bound of at most
    ``transfer_divergence`` nats, and goes towards q as far as the passages are trusted
    (`rapid.speculation.trust_region`).

    With a ``transfer_temperature`` Tₓ above 0 every position is transferred: p and q are taken at Tₓ, and the token is
    sampled from softmax((z + η·Tₓ·(q − p))/T), T being the request's temperature, or is the argmax where T is 0. With 0
    the transfer is the paper's: p and q are taken at T, what has no q follows p, and at T = 0 nothing is transferred.

    The whole value travels with the sequence to its engine. So a new option needs a field here, a field of the
    request's body, and the code that uses it.

    Raises:
        InvalidRequest: a value is unknown or out of range; ``param`` names the field.
    """

    strategy: str = "rapid"
    num_draft_tokens: int | Literal["auto"] = "auto"
    transfer_strength: float | Literal["auto"] = 10.0
    transfer_temperature: float = 0.0
    transfer_divergence: float = 8.0
    verification: str = "published"
    draft_top_k: int = 64
    refresh: Literal["off", "auto"] = "off"
    draft_vocabulary: Size = "auto"
    rag_model: str = "target"
    num_answers: int = 5
    num_clusters: int = 2
    draft_cache: Literal["window", "snap"] = "snap"
    draft_cache_tokens: int = 1024

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
        eta = self.transfer_strength
        require(
            eta == "auto" or (not isinstance(eta, str) and 0 <= eta <= 1000),
            "transfer_strength",
            '"auto" or between 0 and 1000',
        )
        require(0 <= self.transfer_temperature <= 10, "transfer_temperature", "between 0 and 10")
        bounded = math.isfinite(self.transfer_divergence) and self.transfer_divergence >= 0
        require(bounded, "transfer_divergence", "0 or a positive number of nats")
        known = f"one of {', '.join(VERIFICATION_RULES)}"
        require(self.verification in VERIFICATION_RULES, "verification", known)
        require(1 <= self.draft_top_k <= 4096, "draft_top_k", "between 1 and 4096")
        require(self.refresh in ("off", "auto"), "refresh", "off or auto")
        size = self.draft_vocabulary
        require(
            size in ("auto", "full") or (isinstance(size, int) and 1024 <= size <= 2**20),
            "draft_vocabulary",
            '"auto", "full" or between 1024 and 1048576',
        )
        require(self.rag_model in ("target", "drafter"), "rag_model", "target or drafter")
        require(1 <= self.num_answers <= 16, "num_answers", "between 1 and 16")
        require(1 <= self.num_clusters <= 10, "num_clusters", "between 1 and 10")
        require(self.draft_cache in ("window", "snap"), "draft_cache", "window or snap")
        require(32 <= self.draft_cache_tokens <= 2**20, "draft_cache_tokens", f"between 32 and {2**20}")

    @property
    def fixed_draft_tokens(self) -> int | None:
        """γ if the request gives it; None if the controller chooses it."""
        return None if self.num_draft_tokens == "auto" else self.num_draft_tokens

    @property
    def transfers(self) -> bool:
        """Whether a drafter's q may change the output of a sampling request."""
        moves = self.transfer_divergence > 0 if self.transfer_strength == "auto" else self.transfer_strength > 0
        return moves and self.verification != "lossless" and STRATEGIES[self.strategy].transfers

    @property
    def transfers_everywhere(self) -> bool:
        """Whether each token is drawn by its augmented logits, so that every position needs a q."""
        return self.transfer_temperature > 0 and self.transfers

    def warping(self, sampling: SamplingParams) -> SamplingParams:
        """How p and q are made of logits: as ``sampling`` says, but for the transfer's own temperature."""
        return replace(sampling, temperature=self.transfer_temperature) if self.transfers_everywhere else sampling

    def drafts_likeliest(self, sampling: SamplingParams) -> bool:
        """Whether a draft token is the likeliest of its q, and no draw.

        A transfer everywhere draws each token by its position's own numbers, whatever was drafted. A guess is enough.
        """
        return sampling.temperature == 0 or self.transfers_everywhere
