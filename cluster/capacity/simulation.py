"""Simulates many users over R targets and S drafters, for the ratio R:S that one round's arithmetic cannot give.

An engine works as `rapid.engine.engine` does: it runs one pass after another, and each pass serves every user that
waits when it begins. A user drafts, verifies and begins again. With overlap the user's drafter also works while the
target verifies, as `cluster.capacity.planner.Round` says; passes for a wrong guess still cost the drafter's time.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from cluster.capacity.planner import CALL_S

GAMMAS = (1, 2, 3, 4, 6, 8, 12)  # tried for each ratio


@dataclass(frozen=True)
class Setup:
    """``verify_s(batch, γ)`` and ``draft_s(batch)`` are seconds a pass.

    ``..._seats`` is the number of sequences that an engine has room for. A user without a seat on both a target and a
    drafter waits, and writes nothing.
    """

    num_users: int
    num_targets: int
    num_drafters: int
    gamma: int
    acceptance: float
    verify_s: Callable[[int, int], float]
    draft_s: Callable[[int], float]
    overlap: bool = False
    target_seats: int = 256
    drafter_seats: int = 256
    call_s: float = CALL_S


@dataclass(frozen=True)
class Outcome:
    """The result. ``..._busy`` are shares of the time; ``draft_waste`` is the share of draft steps that were lost."""

    num_targets: int
    num_drafters: int
    gamma: int
    tokens_per_second: float
    tokens_per_second_per_user: float
    target_busy: float
    drafter_busy: float
    draft_waste: float


@dataclass(eq=False)
class _Job:
    """A number of passes of an engine for one user; at the end ``done`` is called, unless the job was cancelled."""

    steps: int
    done: Callable[[], None]
    taken: int = 0
    cancelled: bool = False


class _Clock:
    """Events in order of time. At equal times ends come before beginnings, so that a pass includes all waiting jobs."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, event: Callable[[], None], *, begins: bool = False) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, begins, self._count, event))

    def tick(self) -> None:
        self.now, _, _, event = heapq.heappop(self._events)
        event()


class _Engine:
    """Runs passes back to back while any job waits; each pass serves all waiting jobs."""

    def __init__(self, clock: _Clock, pass_s: Callable[[int], float]) -> None:
        self._clock, self._pass_s = clock, pass_s
        self._waiting: list[_Job] = []
        self._running = False
        self.busy_s, self.steps = 0.0, 0

    def submit(self, job: _Job) -> None:
        self._waiting.append(job)
        self._wake()

    def _wake(self) -> None:
        if not self._running:
            self._running = True
            self._clock.after(0.0, self._begin, begins=True)

    def _begin(self) -> None:
        batch, self._waiting = [job for job in self._waiting if not job.cancelled], []
        if not batch:
            self._running = False
            return
        seconds = self._pass_s(len(batch))
        self.busy_s += seconds
        self.steps += len(batch)
        self._clock.after(seconds, lambda: self._end(batch))

    def _end(self, batch: list[_Job]) -> None:
        self._running = False
        for job in batch:
            job.taken += 1
            if not job.cancelled and job.taken < job.steps:
                self._waiting.append(job)
            elif not job.cancelled:
                job.done()
        if self._waiting:
            self._wake()


@dataclass
class _Tally:
    rounds: int = 0
    tokens: int = 0
    useful_steps: int = 0


@dataclass(eq=False)
class _User:
    setup: Setup
    clock: _Clock
    target: _Engine
    drafter: _Engine | None
    chance: random.Random
    tally: _Tally
    ahead: _Job | None = field(default=None)

    def draft(self) -> None:
        """Begins a round with an empty draft."""
        if self.drafter is None:
            self.clock.after(self.setup.call_s, self.verify)
        else:
            job = _Job(self.setup.gamma, self._send)
            self.tally.useful_steps += job.steps
            self.drafter.submit(job)

    def verify(self) -> None:
        self.target.submit(_Job(1, self.judge))
        if self.setup.overlap and self.drafter is not None:
            self.ahead = _Job(self.setup.gamma + 1, lambda: None)
            self.drafter.submit(self.ahead)

    def judge(self) -> None:
        """The verdict: counts the accepted tokens, then continues the draft made ahead, or discards it."""
        accepted = 0
        while accepted < self.setup.gamma and self.chance.random() < self.setup.acceptance:
            accepted += 1
        self.tally.rounds += 1
        self.tally.tokens += accepted + 1
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            self.draft()
            return
        if accepted < self.setup.gamma or self.chance.random() >= self.setup.acceptance:
            ahead.cancelled = True
            self.draft()
            return
        self.tally.useful_steps += ahead.steps
        if ahead.taken == ahead.steps:
            self._send()
        else:
            ahead.done = self._send

    def _send(self) -> None:
        """Waits for two calls: the one that asked for the complete draft, and the one that verifies it."""
        self.clock.after(2 * self.setup.call_s, self.verify)


def simulate(setup: Setup, *, rounds: int = 100, seed: int = 0) -> Outcome:
    """Runs until the users with seats have had ``rounds`` rounds each on average. A seed always gives one outcome."""
    clock, tally, chance = _Clock(), _Tally(), random.Random(seed)
    verify_s = lru_cache(lambda batch: setup.verify_s(batch, setup.gamma))
    targets = [_Engine(clock, verify_s) for _ in range(setup.num_targets)]
    num_drafters = setup.num_drafters if setup.gamma else 0
    drafters = [_Engine(clock, lru_cache(setup.draft_s)) for _ in range(num_drafters)]
    seated = min(setup.num_users, setup.num_targets * setup.target_seats)
    if drafters:
        seated = min(seated, num_drafters * setup.drafter_seats)
    for i in range(seated):
        drafter = drafters[i % num_drafters] if drafters else None
        user = _User(setup, clock, targets[i % setup.num_targets], drafter, chance, tally)
        clock.after(0.0, user.draft)
    while tally.rounds < rounds * seated:
        clock.tick()
    speed = tally.tokens / clock.now

    def busy(engines: list[_Engine]) -> float:
        return min(1.0, sum(engine.busy_s for engine in engines) / (clock.now * len(engines))) if engines else 0.0

    steps = sum(drafter.steps for drafter in drafters)
    return Outcome(
        setup.num_targets,
        num_drafters,
        setup.gamma if drafters else 0,
        speed,
        speed / setup.num_users,
        busy(targets),
        busy(drafters),
        1 - min(tally.useful_steps, steps) / steps if steps else 0.0,
    )


def every_ratio(
    setup: Setup,
    gpus: int,
    *,
    target_gpus: int = 1,
    drafter_gpus: int = 1,
    gammas: Sequence[int] = GAMMAS,
    rounds: int = 50,
) -> list[Outcome]:
    """The best γ's outcome for every R:S that uses all GPUs (no room for one more engine), few targets first.

    R alone decodes plainly. `every_ratio` replaces the numbers of engines and γ in ``setup``.
    """
    outcomes = []
    for num_targets in range(1, gpus // target_gpus + 1):
        num_drafters = (gpus - num_targets * target_gpus) // drafter_gpus
        if num_targets < (gpus - num_drafters * drafter_gpus) // target_gpus:
            continue
        tried = [
            replace(setup, num_targets=num_targets, num_drafters=num_drafters, gamma=gamma)
            for gamma in (gammas if num_drafters else (0,))
        ]
        outcomes.append(max((simulate(one, rounds=rounds) for one in tried), key=lambda it: it.tokens_per_second))
    return outcomes
