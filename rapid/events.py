"""The events of a request: a Delta for each round, and a Finish at the end with the request's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rapid.speculation.draft import Transferred


@dataclass
class Transfer:
    """The transfer at the ``positions`` whose η was chosen (`rapid.speculation.trust_region`), in means over them.

    ``strength`` is η, ``divergence`` KL(p̂‖p), and ``bound`` its bound ε, both in nats. ``confidence`` is that of
    retrieval, ``uncertainty`` the target's share of both models' entropies. ``agreement`` is that of p and q at the end
    of the output.
    """

    positions: int = 0
    strength: float = 0.0
    divergence: float = 0.0
    bound: float = 0.0
    confidence: float = 0.0
    uncertainty: float = 0.0
    agreement: float = 0.0

    def add(self, found: Transferred, confidence: float) -> None:
        """Adds the sums of a round."""
        num_new = int(found.positions)
        self._mix({**found._asdict(), "confidence": confidence * num_new}, num_new)
        self.agreement = found.agreement

    def _mix(self, sums: dict[str, float], num_new: int) -> None:
        before, self.positions = self.positions, self.positions + num_new
        for name in ("strength", "divergence", "bound", "confidence", "uncertainty"):
            setattr(self, name, (getattr(self, name) * before + sums[name]) / max(1, self.positions))

    @classmethod
    def of_all(cls, several: Sequence[Transfer]) -> Transfer:
        whole = cls()
        for each in several:
            whole._mix({name: value * each.positions for name, value in asdict(each).items()}, each.positions)
        whole.agreement = sum(each.agreement * each.positions for each in several) / max(1, whole.positions)
        return whole


@dataclass
class Statistics:
    """Counts and times of one request; times are in milliseconds. docs/openai_api.md defines each field.

    ``confidence`` is the retrieval's, 0 to 1; None where nothing was retrieved from.
    ``queueing`` is the time until the target's engine admitted the sequence.
    ``transport`` is the part of the rounds that is neither drafting nor verification: messages and waiting.
    ``resuming`` is the time to continue on another engine after the target's engine was lost, ``resumed`` times;
    ``resuming_prefill`` is the part of it in which that engine read the prompt and the output so far.
    """

    strategy: str
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    lookup_drafted: int = 0
    lookup_accepted: int = 0
    datastore_drafted: int = 0
    datastore_accepted: int = 0
    drafted_ahead: int = 0
    emitted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    context_tokens: int = 0
    retrieved_tokens: int = 0
    confidence: float | None = None
    draft_prompt_tokens: int = 0
    chunks: list[dict[str, float]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    fallback: str | None = None
    resumed: int = 0
    drafters_lost: int = 0
    refreshed: int = 0
    transfer: Transfer = field(default_factory=Transfer)
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
                "resuming_prefill",
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
        """The statistics of all choices of one prompt: each choice's own work is added up, shared work counts once."""
        first = choices[0]

        def summed(*names: str) -> dict[str, Any]:
            return {name: sum(getattr(choice, name) for choice in choices) for name in names}

        times = {name: sum(choice.timings_ms[name] for choice in choices) for name in first.timings_ms}
        shared = {name: max(choice.timings_ms[name] for choice in choices) for name in ("retrieval", "total")}
        return replace(
            first,
            **summed("rounds", "drafted", "accepted", "lookup_drafted", "lookup_accepted", "drafted_ahead", "emitted"),
            **summed("datastore_drafted", "datastore_accepted", "resumed", "drafters_lost", "refreshed"),
            cached_tokens=min(choice.cached_tokens for choice in choices),  # the first may fill pages for the rest
            fallback=next((choice.fallback for choice in choices if choice.fallback), None),
            transfer=Transfer.of_all([choice.transfer for choice in choices]),
            timings_ms=times | shared,
        )


class NamedToken(NamedTuple):
    """A token, the bytes that it stands for, and its natural log-probability."""

    token: int
    spelled: bytes
    logprob: float


class TokenLogprobs(NamedTuple):
    """A written token, and the most likely tokens at its position.

    The log-probabilities are of the distribution that the token was sampled from: after penalties, grammar and warping,
    and as the verification rule shifts it. For a greedy choice they are of the unwarped distribution.
    """

    chosen: NamedToken
    top: list[NamedToken]


class PromptToken(NamedTuple):
    """A token of the prompt as the target reads it, and how likely it was there; the likeliest has ``rank`` 1.

    Both are None for the first token, which has nothing before it. The log-probabilities are the model's own.
    """

    token: int
    spelled: bytes
    logprobs: TokenLogprobs | None = None
    rank: int | None = None


class Delta(NamedTuple):
    """One round's outcome. ``pieces[i]`` is the text that ``tokens[i]`` completed, which may be empty.

    The drafter ``source`` drafted the first ``num_accepted`` tokens; the token after them, if there is one, is the
    target's (recovered or bonus). ``chunks`` is `Statistics.chunks`, empty before the retriever has answered.
    ``logprobs`` has an entry for each token whose text is complete with this event. ``choice`` is the number of the
    choice, from 0.
    """

    tokens: list[int]
    pieces: list[str]
    num_drafted: int
    num_accepted: int
    source: str
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
    """The end of a choice. ``reason`` is "stop" (end of sequence or stop string) or "length".

    ``stop`` is the stop string that ended it, or the stop token; None at an end of sequence.
    """

    text: str
    reason: str
    statistics: Statistics
    logprobs: list[TokenLogprobs] = []  # noqa: RUF012 (never changed)
    choice: int = 0
    stop: str | int | None = None
