"""How one request speculates: the options that a client may set, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rapid.errors import InvalidRequest
from rapid.models.draft_vocabulary import Size
from rapid.strategies import STRATEGIES, VERIFICATION_RULES


@dataclass(frozen=True)
class SpeculationParams:
    """How one request decodes. γ is ``num_draft_tokens``, η is ``transfer_strength`` (paper §3 and §4.1).

    With γ "auto" the controller chooses γ every round from measured costs and acceptance
    (`rapid.speculation.controller`); the choice may be 0. With a number, the first drafter of the strategy that has an
    offer drafts that many tokens every round. A drafter model draws from about ``draft_vocabulary`` tokens
    (`rapid.models.draft_vocabulary`). ``rag_model`` names the role whose weights the strategy "rag" uses.

    The whole value travels with the sequence to its engine. So a new option needs a field here, a field of the
    request's body, and the code that uses it.

    Raises:
        InvalidRequest: a value is unknown or out of range; ``param`` names the field.
    """

    strategy: str = "rapid"
    num_draft_tokens: int | Literal["auto"] = "auto"
    transfer_strength: float = 10.0
    verification: str = "published"
    draft_top_k: int = 64
    draft_vocabulary: Size = "auto"
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
        known = f"one of {', '.join(VERIFICATION_RULES)}"
        require(self.verification in VERIFICATION_RULES, "verification", known)
        require(1 <= self.draft_top_k <= 4096, "draft_top_k", "between 1 and 4096")
        size = self.draft_vocabulary
        require(
            size in ("auto", "full") or (isinstance(size, int) and 1024 <= size <= 2**20),
            "draft_vocabulary",
            '"auto", "full" or between 1024 and 1048576',
        )
        require(self.rag_model in ("target", "drafter"), "rag_model", "target or drafter")

    @property
    def fixed_draft_tokens(self) -> int | None:
        """γ if the request gives it; None if the controller chooses it."""
        return None if self.num_draft_tokens == "auto" else self.num_draft_tokens
