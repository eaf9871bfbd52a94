"""The cost and the tokens of a round of speculative decoding, the best γ, and the number of GPUs that a load needs.

Acceptance α is the probability that a draft token is accepted, given that the tokens before it are. The model treats
tokens as independent. So all γ are accepted with probability α^γ, and a round writes 1 + α + … + α^γ tokens (Leviathan
et al., arXiv 2211.17192).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.capacity.devices import Device
from cluster.capacity.shapes import ServedModel

MAX_GAMMA = 16
USABLE_MEMORY = 0.9  # of a device; the rest is for activations, graphs and the allocator
# Half of the time of a round's messages, with engines that sample, and sleep in between, on two cores: 2.7 ms in
# benchmarks/results/coordination.json. With engines that compute nothing it is 0.35 ms.
CALL_S = 1.35e-3


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens that a round of ``gamma`` draft tokens writes: (1 - α^(γ+1)) ÷ (1 - α)."""
    return sum(acceptance**i for i in range(gamma + 1))


def per_token_acceptance(rate: float, gamma: int) -> float:
    """The α for which accepted ÷ drafted is ``rate``, with γ tokens drafted every round."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, gamma) - 1 < rate * gamma else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Round:
    """One round of one sequence, in a batch that drafts and verifies in step. Seconds.

    Plain (γ = 0):   round = verify + call
    In turn:         round = γ·draft + verify + 2 calls
    With overlap:    round = verify + hit·max(0, (γ+1)·draft - verify) + (1 - hit)·γ·draft + 2 calls

    While the target verifies, the drafter drafts ahead as if all tokens were accepted: it guesses the token that
    follows, and drafts γ more. The guess is a hit when all γ tokens are accepted and the guessed token is right, too,
    which has probability α^(γ+1). The next draft is then ready, or nearly. Otherwise that work is lost, and the drafter
    starts again after the verdict. (When sampling, the guess is right less often than a draft token is accepted, so
    this is an upper bound for overlap.)
    """

    gamma: int
    acceptance: float
    draft_s: float  # one step
    verify_s: float
    overlap: bool = False
    call_s: float = CALL_S

    @property
    def hit_rate(self) -> float:
        return self.acceptance ** (self.gamma + 1)

    @property
    def round_s(self) -> float:
        if self.gamma == 0:
            return self.verify_s + self.call_s
        drafting = self.gamma * self.draft_s
        if self.overlap:
            late = max(0.0, drafting + self.draft_s - self.verify_s)
            drafting = self.hit_rate * late + (1 - self.hit_rate) * drafting
        return drafting + self.verify_s + 2 * self.call_s

    @property
    def tokens(self) -> float:
        return expected_tokens(self.acceptance, self.gamma)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.round_s

    @property
    def drafter_share(self) -> float:
        """The share of a round in which a drafter works for one target, lost work included."""
        if self.gamma == 0:
            return 0.0
        drafting, ahead = self.gamma * self.draft_s, (self.gamma + 1) * self.draft_s
        if not self.overlap:
            return drafting / self.round_s
        missed = min(self.verify_s, ahead) + drafting
        return (self.hit_rate * ahead + (1 - self.hit_rate) * missed) / self.round_s


@dataclass(frozen=True)
class Workload:
    """The work of each of a target's ``batch`` sequences. ``context`` and ``retrieved`` are prompts, in tokens."""

    context: int
    retrieved: int
    batch: int
    acceptance: float
    new_tokens: int = 512


@dataclass(frozen=True)
class Fleet:
    """Enough replicas for a load, and the tokens they write together.

    ``cost`` is per million tokens, for a given price.
    """

    targets: int
    drafters: int
    gpus: int
    tokens_per_second: float
    cost: float | None = None


@dataclass(frozen=True)
class Planner:
    """The two models on their devices, one kind of device for both.

    ``drafter`` None means that the target drafts with its own weights, on its own device, so there is no overlap.
    """

    device: Device
    target: ServedModel
    drafter: ServedModel | None
    work: Workload
    chunk: int = 2048  # tokens of a prefill pass
    target_kv_bytes: float | None = None  # of a device; None: all memory beside the weights
    drafter_kv_bytes: float | None = None
    call_s: float = CALL_S
    other_gpus: int = 0  # beside the engines', for any load: the embedder's

    def draft_s(self, batch: int) -> float:
        """One draft step of ``batch`` sequences, when half of their output is written."""
        return self.device.pass_s(
            self.drafter or self.target, batch, 1, self.work.retrieved + self.work.new_tokens // 2
        )

    def verify_s(self, batch: int, gamma: int) -> float:
        """One pass of the target over γ + 1 tokens of each of ``batch`` sequences."""
        return self.device.pass_s(self.target, batch, gamma + 1, self.work.context + self.work.new_tokens // 2)

    def round(self, gamma: int, *, overlap: bool = False) -> Round:
        batch = self.work.batch
        return Round(
            gamma,
            self.work.acceptance,
            self.draft_s(batch),
            self.verify_s(batch, gamma),
            overlap and self.drafter is not None,
            self.call_s,
        )

    def best_round(self, *, overlap: bool = False) -> Round:
        """The round with the γ that writes the most tokens a second; γ is 0 where drafting does not pay."""
        rounds = [self.round(gamma, overlap=overlap) for gamma in range(MAX_GAMMA + 1)]
        return max(rounds, key=lambda round: round.tokens_per_second)

    def _kv_room(self, model: ServedModel, given: float | None) -> float:
        """Bytes of a device for keys and values: ``given``, but not more than the device has."""
        left = max(0.0, self.device.memory * USABLE_MEMORY - model.bytes_held)
        return left if given is None else min(given, left)

    @property
    def target_seats(self) -> int:
        """The number of sequences that fit on a target.

        If the target drafts too, each one counts twice, because the two prompts differ.
        """
        tokens = self.work.context + self.work.new_tokens
        if self.drafter is None:
            tokens += self.work.retrieved + self.work.new_tokens
        return self.target.sequences_that_fit(self._kv_room(self.target, self.target_kv_bytes), tokens)

    @property
    def drafter_seats(self) -> int:
        if self.drafter is None:
            return self.target_seats
        tokens = self.work.retrieved + self.work.new_tokens + MAX_GAMMA
        return self.drafter.sequences_that_fit(self._kv_room(self.drafter, self.drafter_kv_bytes), tokens)

    @property
    def target_prefill_s(self) -> float:
        return self.device.prefill_s(self.target, self.work.context, self.chunk)

    @property
    def draft_prefill_s(self) -> float:
        return self.device.prefill_s(self.drafter or self.target, self.work.retrieved, self.chunk)

    def fleet_for_users(self, round: Round, users: int, price: float | None = None) -> Fleet:
        """The fleet for ``users`` answers at any moment; their prompts are prefilled already."""
        targets = users / self.work.batch
        return self._fleet(round, targets, targets * round.drafter_share, users * round.tokens_per_second, price)

    def fleet_for_load(self, round: Round, requests_per_second: float, price: float | None = None) -> Fleet:
        """The fleet for requests that arrive at that rate and share no prompt.

        An engine prefills one prompt at a time, and writes for its batch in the rest of the time. So a request occupies
        the engine for its prefill and for its share of the batch's writing.
        """
        writing_s = self.work.new_tokens / (self.work.batch * round.tokens_per_second)
        reading_s = self.target_prefill_s
        if round.gamma and self.drafter is None:
            reading_s += self.draft_prefill_s
        targets = requests_per_second * (reading_s + writing_s)
        drafters = requests_per_second * (self.draft_prefill_s + writing_s * round.drafter_share)
        return self._fleet(round, targets, drafters, requests_per_second * self.work.new_tokens, price)

    def users_carried(self, round: Round, targets: int, drafters: int) -> int:
        """The number of answers that these replicas can write at the same moment."""
        users = float(targets * self.work.batch)
        if round.gamma and self.drafter is not None:
            users = min(users, drafters * self.drafter_seats, drafters / round.drafter_share * self.work.batch)
        return math.floor(users)

    def engine_gpus(self, targets: int, drafters: int) -> int:
        return targets * self.target.num_devices + drafters * (self.drafter or self.target).num_devices

    def _fleet(
        self, round: Round, targets: float, drafters: float, tokens_per_second: float, price: float | None
    ) -> Fleet:
        """Whole replicas for that many engines' work, with enough drafters for all of the targets' sequences."""
        num_targets, num_drafters = math.ceil(targets), 0
        if round.gamma and self.drafter is not None:
            by_memory = num_targets * self.work.batch / max(1, self.drafter_seats)
            num_drafters = math.ceil(max(drafters, by_memory))
        gpus = self.engine_gpus(num_targets, num_drafters) + self.other_gpus
        cost = None if price is None else gpus * price / 3600 / tokens_per_second * 1e6
        return Fleet(num_targets, num_drafters, gpus, tokens_per_second, cost)
