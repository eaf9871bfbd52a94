"""How many tokens of the next pass each task gets."""

from __future__ import annotations

from collections.abc import Iterable

from rapid.engine.pacing import Chunk
from rapid.engine.tasks import RunningTask

_SHARE = 0.25  # of a pass in which a prompt ends, for one that does not end


def schedule(tasks: Iterable[RunningTask], budget: int) -> list[tuple[RunningTask, int]]:
    """How many tokens each task gets: short requests first; long requests share the rest of the budget.

    Behind a pass in which a prompt ends comes the first token of an answer. So a longer prompt, which does not end,
    gets a quarter of its budget, and goes on in later passes.

    Sequences that share pages are moved behind the first of them, because attention reads the pages that neighbours
    share once (`rapid.kernels.prefix`).
    """
    scheduled: list[tuple[RunningTask, int]] = []
    share, one_starts = max(1, int(_SHARE * budget)), False
    shortest_first = sorted(tasks, key=lambda task: task.num_left)
    for running in shortest_first:
        if running.num_left <= budget:
            one_starts |= running.is_in_prompt
        elif one_starts:
            budget = min(budget, share)
        # All rows of logits of a request come from one pass, so its last part is not cut below that many tokens.
        num_tokens = min(running.num_left, budget)
        if 0 < running.num_left - num_tokens < running.request.num_rows:
            num_tokens = running.num_left - running.request.num_rows
        if num_tokens > 0:
            scheduled.append((running, num_tokens))
            budget -= num_tokens
    if not scheduled and shortest_first:  # a request for more rows than the budget runs alone, and exceeds it
        scheduled.append((shortest_first[0], shortest_first[0].num_left))
    pages = [running.request.table.pages for running, _ in scheduled]
    first = {own[0]: i for i, own in reversed(list(enumerate(pages)))}
    order = sorted(range(len(pages)), key=lambda i: (first[pages[i][0]], pages[i]))
    return [scheduled[i] for i in order]


def chunks(scheduled: list[tuple[RunningTask, int]]) -> tuple[list[Chunk], list[Chunk]]:
    """What a pass reads of prompts, and what decodes in it."""
    reading: list[Chunk] = []
    decoding: list[Chunk] = []
    for running, num_tokens in scheduled:
        chunk = Chunk(num_tokens, running.request.sequence.cache.length)
        (reading if running.request.tokens is None else decoding).append(chunk)
    return reading, decoding


def in_parts(scheduled: list[tuple[RunningTask, int]]) -> list[list[tuple[RunningTask, int]]]:
    """Smaller passes in place of one for which there was no memory; empty if it cannot be cut.

    A single request is cut to its first half, and the rest of it is scheduled later.
    """
    if len(scheduled) > 1:
        middle = len(scheduled) // 2
        return [scheduled[:middle], scheduled[middle:]]
    running, num_tokens = scheduled[0]
    first = min(num_tokens // 2, running.num_left - running.request.num_rows)
    return [[(running, first)]] if first > 0 else []
