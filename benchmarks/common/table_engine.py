"""Runs an engine's tasks over tables of logits in place of a model: rounds by the hundred thousand.

The tasks, their random numbers and their readouts are the engine's own. A "model" is a table [V, V]: the logits behind
each last token, so the law of every token is known exactly.
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.engine.messages import (
    CacheView,
    DraftRequest,
    RefineRequest,
    SelfDraftRequest,
    SequenceRequest,
    VerifyRequest,
)
from rapid.engine.propose import propose
from rapid.engine.readout import Download, Draw
from rapid.engine.refine import Refine
from rapid.engine.self_draft import draft_over_view, refine
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.engine.verdicts import Verify
from rapid.engine.verify import verify_draft
from rapid.kv_cache.pool import KVLayout, KVPool
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, certain_draft
from rapid.speculation.params import SpeculationParams

VOCAB, GAMMA = 5, 3
MAX_ROUNDS = 8  # of one sequence
PROMPT, ROOM = 80, MAX_ROUNDS * (GAMMA + 1) + GAMMA + 1  # tokens: a view of two pages leaves out half of the prompt
_VIEW = CacheView("window", 32)
_NONE = frozenset[int]()


def transitions(
    bottom: str | None, sampling: SamplingParams, draft_top_k: int, *, num: int, num_rounds: int, first_seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What ``num`` sequences write in ``num_rounds`` rounds with γ = `GAMMA`, and the target's own law.

    ``bottom`` says who is below the target over its view: nobody (None), a drafter ("model"), or a "lookup". Counts are
    [γ + 1, V, V]: by place in the round, the token before, and the token written. The law [V, V] holds at every place.
    """
    generator = torch.Generator().manual_seed(2)
    target = 1.2 * torch.randn(VOCAB, VOCAB, generator=generator)
    view = target + 0.4 * torch.randn(VOCAB, VOCAB, generator=generator)
    below = target + 0.8 * torch.randn(VOCAB, VOCAB, generator=generator) if bottom else None
    rounds = TableRounds(
        target,
        view,
        below,
        sampling,
        num=num,
        gamma=GAMMA,
        draft_top_k=draft_top_k,
        sampled=bottom == "model",
        first_seed=first_seed,
    )
    counts = np.zeros((GAMMA + 1, VOCAB, VOCAB), np.int64)
    for _ in range(num_rounds):
        for before, written in rounds.round():
            for place, token in enumerate(written):
                counts[place, before, token] += 1
                before = token
    return counts, (target.double() / sampling.temperature).softmax(-1).numpy()


class TableRounds:
    """``num`` sequences that draft ``gamma`` tokens a round from ``view``, and verify them by ``target`` [V, V].

    ``bottom`` is a table for the bottom of a hierarchy, None where the target drafts alone. Its tokens are ``sampled``
    by a drafter's task, or else the likeliest ones, as if they were looked up.
    """

    def __init__(
        self,
        target: Tensor,
        view: Tensor,
        bottom: Tensor | None,
        sampling: SamplingParams,
        *,
        num: int,
        gamma: int,
        draft_top_k: int,
        sampled: bool = True,
        first_seed: int = 0,
    ) -> None:
        self._target, self._view, self._bottom, self._gamma = target, view, bottom, gamma
        self._is_sampled = sampled
        layout = KVLayout(1, 1, torch.float32, (torch.device("cpu"),))
        speculation = SpeculationParams(draft_top_k=draft_top_k)

        def opened(first_seed: int) -> list[Sequence]:
            pool = KVPool(layout, num * (PROMPT + ROOM + 16) * layout.bytes_per_token)
            sequences = []
            for i in range(num):
                request = SequenceRequest([i % len(target)] * PROMPT, ROOM, sampling, speculation)
                cache = pool.open(request.prompt, request.capacity, salt=str(i))
                assert cache is not None
                cache.advance(PROMPT - 1)
                sequences.append(Sequence(i, request, cache, first_seed + i))
            return sequences

        self.sequences = opened(first_seed)
        self._below = opened(first_seed ^ 0x5DEECE66D) if bottom is not None and sampled else []
        self._known = [0] * num

    def round(self) -> list[tuple[int, list[int]]]:
        """One round: of each sequence the token that it began behind, and those that it wrote."""
        drafts = self._drafted_alone() if self._bottom is None else self._drafted_in_layers()
        before = [(s.prompt + s.output)[-1] for s in self.sequences]
        tasks = [verify_draft(s, VerifyRequest(draft)) for s, draft in zip(self.sequences, drafts, strict=True)]
        return list(zip(before, (result.tokens for result in self._run(tasks, self._target)), strict=True))

    def _drafted_alone(self) -> list[Draft]:
        limits = DraftLimits(self._gamma)
        tasks = [draft_over_view(s, SelfDraftRequest(s.position, limits, _VIEW), _NONE) for s in self.sequences]
        return self._run(tasks, self._target)

    def _drafted_in_layers(self) -> list[Draft]:
        """As `rapid.drafters.triforce.HierarchyDrafter.propose`, for all sequences at once."""
        drafts, limits = [Draft(s.position) for s in self.sequences], DraftLimits(self._gamma)
        while short := [i for i, draft in enumerate(drafts) if len(draft.tokens) < self._gamma]:
            below = self._from_below(short, drafts)
            tasks = [
                refine(self.sequences[i], RefineRequest(own, list(drafts[i].tokens), _VIEW), _NONE)
                for i, own in zip(short, below, strict=True)
            ]
            for i, refined in zip(short, self._run(tasks, self._target), strict=True):
                any(drafts[i].append(token, limits, _NONE) for token in refined.each())
        return drafts

    def _from_below(self, short: list[int], drafts: list[Draft]) -> list[Draft]:
        assert self._bottom is not None
        found = {i: Draft(drafts[i].offset + len(drafts[i].tokens)) for i in short}
        room = [i for i in short if len(drafts[i].tokens) + 1 < self._gamma]
        if self._is_sampled:
            tasks = []
            for i in room:
                output, known = self.sequences[i].output, self._known[i]
                self._known[i] = len(output)
                tokens = output[known:] + drafts[i].tokens
                request = DraftRequest(known, tokens, DraftLimits(1), round_start=len(output))
                tasks.append(propose(self._below[i], request, _NONE))
            found |= zip(room, self._run(tasks, self._bottom), strict=True)
        else:
            for i in room:
                last = (self.sequences[i].prompt + self.sequences[i].output + drafts[i].tokens)[-1]
                found[i] = certain_draft(found[i].offset, [int(self._bottom[last].argmax())])
        return [found[i] for i in short]

    def _run(self, tasks: Many[Task[Any]], table: Tensor) -> list[Any]:
        """Runs ``tasks`` to their ends: passes read ``table``, or that of the view where they are over one."""
        results: dict[int, Any] = {}
        wishes: dict[int, Any] = {}

        def send(i: int, answer: object) -> None:
            try:
                wishes[i] = tasks[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
                wishes.pop(i, None)

        for i in range(len(tasks)):
            send(i, None)
        while wishes:
            passes = {i: wish for i, wish in wishes.items() if isinstance(wish, ForwardRequest)}
            parts = [torch.as_tensor(wish.tokens)[-wish.num_rows :] for wish in passes.values()]
            if parts:
                rows = torch.cat(parts)
                over_view = torch.cat(
                    [torch.full((len(p),), w.view is not None) for p, w in zip(parts, passes.values(), strict=True)]
                )
                logits = torch.where(over_view[:, None], self._view[rows], table[rows]).split([len(p) for p in parts])
                for (i, wish), own in zip(passes.items(), logits, strict=True):
                    wish.table.advance(len(wish.tokens))
                    if wish.drawing is None:
                        send(i, own)
                    else:
                        wishes[i] = Draw(own, wish.drawing, None)
            for kind in (Draw, Refine, Verify, Download):
                own_wishes = {i: wish for i, wish in wishes.items() if isinstance(wish, kind)}
                if own_wishes:
                    answers: list[Any] = kind.together(list(own_wishes.values()))
                    for i, answer in zip(own_wishes, answers, strict=True):
                        send(i, answer)
        return [results[i] for i in range(len(tasks))]
