"""Requests whose target drafts for itself: what they write, how often, and that they need nothing they say they do not.

The prompts are of seven pages, and a draft sees two or three of them.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from running import GREEDY, logits_after
from world import World, complete, first_eight, greedily, run

from benchmarks.common.table_engine import MAX_ROUNDS, transitions
from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.engine.messages import SequenceRequest
from rapid.errors import EngineLost
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities

LONG = ("abcabbcacb" * 3 + "aabbbcacca" * 3 + "cab") * 2 + "\n\nab"
WAYS = [{"strategy": "magicdec", "draft_cache": "window"}, {"strategy": "magicdec"}, {"strategy": "triforce"}]
ways = pytest.mark.parametrize("way", WAYS, ids=["window", "snap", "triforce"])


def asked(world: World, text: str = LONG, **options: Any) -> GenerationRequest:
    return world.request(prompt=world.prompt(text), draft_cache_tokens=32, **options)


@pytest.mark.parametrize("gamma", [1, 4, 10, "auto"])
@pytest.mark.parametrize(
    ("way", "colocated"),
    [*((way, False) for way in WAYS), (WAYS[-1], True)],
    ids=["window", "snap", "triforce", "triforce-colocated"],
)
def test_greedy_text_is_the_target_s_own(world: World, way: dict[str, Any], gamma: int | str, colocated: bool) -> None:
    backend = LocalBackend(world.target, world.target if colocated else world.drafter, first_eight)
    completion = run(asked(world, gamma=gamma, max_tokens=60, **way), backend)
    assert completion.tokens == greedily(world.target.model, world.prompt(LONG).tokens, 60)
    statistics = completion.statistics
    if gamma != "auto":
        assert 0 < statistics.accepted < statistics.drafted
    assert statistics.draft_prompt_tokens == (0 if colocated or way["strategy"] == "magicdec" else len(LONG))
    assert {delta.source for delta in completion.deltas} <= {"self", "hierarchy", "none"}
    assert world.num_sequences() == 0


@ways
def test_many_at_once_beside_other_strategies_write_what_each_writes_alone(world: World, way: dict[str, Any]) -> None:
    """Sequences with the same prompt share its pages, also those that a view leaves out for one of them."""
    requests = [asked(world, gamma=3, max_tokens=40, sampling=SamplingParams(seed=i), **way) for i in range(4)]
    requests += [asked(world, strategy=name, max_tokens=40) for name in ("speculative", "lookup", "autoregressive")]
    alone = [run(request, world.backend()).tokens for request in requests]

    async def together() -> list[list[int]]:
        completions = await asyncio.gather(*(complete(request, world.backend()) for request in requests))
        return [completion.tokens for completion in completions]

    assert asyncio.run(together()) == alone


@pytest.mark.parametrize("bottom", [None, "model", "lookup"])
@pytest.mark.parametrize("draft_top_k", [3, 64])
def test_the_law_at_every_place_of_a_round_is_the_target_s_own(bottom: str | None, draft_top_k: int) -> None:
    """The tasks themselves, over tables of logits; `benchmarks.output_law` counts 200,000 tokens at each place."""
    sampling = SamplingParams(temperature=0.8)
    counts, law = transitions(bottom, sampling, draft_top_k, num=500, num_rounds=MAX_ROUNDS)
    assert counts.sum((1, 2)).min() > 1000
    for at_place in counts:
        expected = at_place.sum(1, keepdims=True) * law
        statistic, degrees = ((at_place - expected) ** 2 / expected).sum(), law.size - len(law)
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@ways
def test_the_output_s_law_is_the_target_s_own(make_world: Callable[..., World], way: dict[str, Any]) -> None:
    """All continuations of 3 tokens, over several rounds."""
    world, size, sampling = make_world(5), 5, SamplingParams(temperature=0.8, top_p=0.8)
    prompt = world.prompt(("abcabbcacb" * 3 + "aabbbaabba" * 3 + "cab") * 2 + "\n\nab")
    exact = np.ones((size, size, size))
    for n in range(3):
        for prefix in itertools.product(range(size), repeat=n):
            probs = probabilities(logits_after(world.target.model, prompt.tokens + list(prefix)), sampling)
            exact[prefix] *= probs.numpy().reshape(-1, *[1] * (2 - n))
    request = world.request(
        prompt=prompt, gamma=2, max_tokens=3, sampling=sampling, draft_top_k=3, draft_cache_tokens=32, **way
    )
    backend = world.backend()
    counts, seeds, drafted = np.zeros_like(exact), iter(range(400)), 0

    async def worker() -> None:
        nonlocal drafted
        for seed in seeds:
            completion = await complete(replace(request, sampling=replace(sampling, seed=seed)), backend)
            counts[tuple(completion.tokens)] += 1
            drafted += completion.statistics.drafted

    async def all_workers() -> None:
        await asyncio.gather(*(worker() for _ in range(100)))

    asyncio.run(all_workers())
    assert drafted >= 400
    frequent = exact * 400 >= 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(exact[frequent], exact[~frequent].sum()) * 400
    statistic, degrees = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum(), len(observed) - 1
    assert counts[exact == 0].sum() == 0
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


class _DyingTarget(LocalBackend):
    """The target's engine dies once, at call number ``fails_at`` of a lease."""

    def __init__(self, world: World, fails_at: int) -> None:
        super().__init__(world.target, world.drafter, first_eight)
        self.resume_timeout_s, self._left, self.calls = 5.0, fails_at, list[str]()

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        async with super().lease(role, request) as lease:

            async def call(method: str, *message: Any) -> Any:
                result = await lease.call(method, *message)
                if role == "target" and method != "pulse":
                    self.calls.append(method)
                    self._left -= 1
                    if self._left == 0:
                        raise EngineLost("the engine died")
                return result

            yield lease.over(call)


@ways
def test_a_target_that_dies_while_it_drafts_changes_nothing(world: World, way: dict[str, Any]) -> None:
    """With a seed: the next engine ranks the same pages, and draws the same numbers."""
    request = asked(world, gamma=3, max_tokens=20, sampling=SamplingParams(seed=7), **way)
    expected = run(request, world.backend()).tokens
    backend = _DyingTarget(world, 0)
    run(request, backend)
    for at in range(2, len(backend.calls), 3):
        dying = _DyingTarget(world, at)
        completion = run(request, dying)
        assert completion.tokens == expected
        assert completion.statistics.resumed == 1


def test_a_hierarchy_without_its_bottom_goes_on_with_lookups(world: World) -> None:
    """The drafter's engine is lost at its third call. The text does not change, and drafting goes on."""
    calls = iter(range(1000))

    class Backend(LocalBackend):
        @asynccontextmanager
        async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
            async with super().lease(role, request) as lease:

                async def call(method: str, *message: Any) -> Any:
                    if role == "drafter" and next(calls) == 3:
                        raise EngineLost("the engine died")
                    return await lease.call(method, *message)

                yield lease.over(call)

    backend = Backend(world.target, world.drafter, first_eight)
    completion = run(asked(world, strategy="triforce", gamma=4, max_tokens=40, sampling=GREEDY), backend)
    assert completion.tokens == greedily(world.target.model, world.prompt(LONG).tokens, 40)
    assert completion.statistics.drafters_lost == 1
    assert all(delta.source == "hierarchy" for delta in completion.deltas[:-1])


def test_a_target_that_cannot_draft_decodes_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid.engine.self_draft.rank_pages", lambda *_: 1 / 0)
    completion = run(asked(world, strategy="magicdec", gamma=4), world.backend())
    assert completion.tokens == greedily(world.target.model, world.prompt(LONG).tokens, 12)
    assert (completion.statistics.drafted, completion.statistics.fallback) == (0, "drafter_lost")
