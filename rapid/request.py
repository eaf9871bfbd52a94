"""One completion: what is asked for, what comes back, and what is counted on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from rapid.control import Source
from rapid.errors import InvalidRequest
from rapid.logits import LogitParams
from rapid.prompts import Prompt
from rapid.sampling import SamplingParams
from rapid.speculative import RULES


class Strategy(NamedTuple):
    """``retrieves``: a model reads the retrieved context. ``drafts``: it drafts from it, and the target verifies.

    ``transfers``: the target's distribution is augmented by the drafter's. ``looks_up``: drafts come from the text too.
    """

    retrieves: bool
    drafts: bool
    transfers: bool
    looks_up: bool


STRATEGIES: dict[str, Strategy] = {
    "autoregressive": Strategy(False, False, False, False),  # the long context, plain decoding
    "rag": Strategy(True, False, False, False),  # one model on the retrieved context alone
    "lookup": Strategy(False, False, False, True),  # drafts found in the text, no drafter: lossless
    "speculative": Strategy(True, True, False, False),  # a RAG drafter, η = 0: lossless
    "rapid": Strategy(True, True, True, True),
}


@dataclass(frozen=True)
class SpeculationParams:
    """How one request decodes. γ is ``num_draft_tokens``, η is ``transfer_strength`` (paper §3 and §4.1).

    γ "auto" is chosen every round from measured costs and acceptance (`rapid.control`), 0 included; a number is drafted
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


@dataclass
class Statistics:
    """What one request did; times in milliseconds. The README defines each field.

    ``queueing`` is the time until the target had a place.
    ``transport`` is the time of the rounds that is neither drafting nor verification: messages and waiting.
    ``resuming`` is the time it took to go on elsewhere, ``resumed`` times, after the target's engine was lost.
    """

    strategy: str
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    lookup_drafted: int = 0
    lookup_accepted: int = 0
    drafted_ahead: int = 0
    emitted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    context_tokens: int = 0
    retrieved_tokens: int = 0
    draft_prompt_tokens: int = 0
    chunks: list[dict[str, float]] = field(default_factory=list)
    fallback: str | None = None
    resumed: int = 0
    drafters_lost: int = 0
    timings_ms: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "queueing",
                "retrieval",
                "target_prefill",
                "draft_prefill",
                "drafting",
                "verification",
                "transport",
                "resuming",
                "total",
            ),
            0.0,
        )
    )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted ÷ drafted; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted per target forward pass."""
        return self.emitted / self.rounds if self.rounds else None

    @classmethod
    def of_all(cls, choices: Sequence[Statistics]) -> Statistics:
        """Those of several choices of one prompt: what each did is summed, what they share is counted once."""
        first = choices[0]

        def summed(*names: str) -> dict[str, Any]:
            return {name: sum(getattr(choice, name) for choice in choices) for name in names}

        times = {name: sum(choice.timings_ms[name] for choice in choices) for name in first.timings_ms}
        shared = {name: max(choice.timings_ms[name] for choice in choices) for name in ("retrieval", "total")}
        return replace(
            first,
            **summed("rounds", "drafted", "accepted", "lookup_drafted", "lookup_accepted", "drafted_ahead", "emitted"),
            **summed("resumed", "drafters_lost"),
            cached_tokens=min(choice.cached_tokens for choice in choices),  # what one read, the next may find
            fallback=next((choice.fallback for choice in choices if choice.fallback), None),
            timings_ms=times | shared,
        )


class NamedToken(NamedTuple):
    """A token with the bytes that it stands for, and its natural log-probability."""

    token: int
    spelled: bytes
    logprob: float


class TokenLogprobs(NamedTuple):
    """A token that was written, and the most likely ones in its place.

    The logarithms are of the distribution that it was sampled from: after penalties, grammar and warping, and as the
    verification rule shifts it. A greedy choice has those of the unwarped distribution.
    """

    chosen: NamedToken
    top: list[NamedToken]


class Delta(NamedTuple):
    """One round's outcome. ``pieces[i]`` is the text that ``tokens[i]`` completed, which may be empty.

    The first ``num_accepted`` tokens were drafted by ``source``; the one after them, if it is there, is the target's.
    ``chunks`` is `Statistics.chunks` as far as it is known. ``logprobs`` has an entry for each token whose text is out
    with this one. ``choice`` is which of n it is of.
    """

    tokens: list[int]
    pieces: list[str]
    num_drafted: int
    num_accepted: int
    source: Source
    elapsed_ms: float
    draft_ms: float
    verify_ms: float
    chunks: list[dict[str, float]]
    logprobs: list[TokenLogprobs] = []  # noqa: RUF012 (never changed)
    choice: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Finish(NamedTuple):
    """The end: ``reason`` is "stop" (end of sequence or stop string) or "length"."""

    text: str
    reason: str
    statistics: Statistics
    logprobs: list[TokenLogprobs] = []  # noqa: RUF012 (never changed)
    choice: int = 0
