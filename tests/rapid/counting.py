"""Counts what many completions write, and compares the counts with a law."""

import asyncio
from dataclasses import replace

import numpy as np
from world import World, complete

from benchmarks.common.closed_forms import Array
from rapid.request import GenerationRequest


def pearson(observed: Array, expected: Array) -> tuple[float, int]:
    """The chi-square statistic and its degrees of freedom; outcomes expected under 5 times count as one."""
    rare = expected < 5
    observed, expected = (
        np.append(counts[~rare], counts[rare].sum()) if rare.any() else counts for counts in (observed, expected)
    )
    return float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()), len(expected) - 1


def assert_follows(observed: Array, probs: Array) -> None:
    """Counts of independent draws agree with ``probs``: 5 standard deviations of chi-square, under one in 100,000."""
    assert abs(probs.sum() - 1) < 1e-5
    assert observed[probs == 0].sum() == 0
    statistic, degrees = pearson(observed, observed.sum() * probs)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


def many(
    world: World, request: GenerationRequest, num: int, num_tokens: int, *, overlap: bool = False, workers: int = 200
) -> Array:
    """Counts of the first ``num_tokens`` tokens of ``num`` completions with different seeds: [V, V, …].

    With ``overlap`` they have no seed, and at least a tenth of them must have used what was drafted ahead.
    """
    counts = np.zeros([world.target.model.vocab_size] * num_tokens)
    backend = world.patient_backend() if overlap else world.backend()
    seeds, num_ahead = iter(range(num)), 0

    async def worker() -> None:
        nonlocal num_ahead
        for seed in seeds:
            sampling = replace(request.sampling, seed=None if overlap else seed)
            completion = await complete(replace(request, sampling=sampling), backend)
            counts[tuple(completion.tokens[:num_tokens])] += 1
            num_ahead += completion.statistics.drafted_ahead > 0

    async def all_workers() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())

    asyncio.run(all_workers())
    assert counts.sum() == num
    assert not overlap or num_ahead >= num / 10
    return counts
