"""Whether answers belong to their own prompts: equal to the answer alone, or each token near the likeliest one.

If numbers are rounded to bfloat16, two tokens may be nearly equally likely, and the rest of the batch may decide which
one wins. From there on a greedy answer differs, and comparing texts has no meaning. So the model, alone, reads the
prompt and the answer, and computes for each token how much less likely it was than the likeliest. In an answer to its
own prompt this margin stays near zero. An answer with a token, or a page of keys and values, of another request fails.
A control measures that such an error is visible: it replays answers beside the wrong questions.
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from benchmarks.common.clients import Asked, Question, ask, new_client
from deployments.builders import build_engine
from deployments.engine_config import EngineConfig
from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.engine.verify import prefill
from rapid.sampling.params import SamplingParams
from rapid.text.prompts import Message, read_chat
from rapid.text.tokenizer import load_tokenizer, spell

# In logits: between the largest margin seen from rounding, 0.31, and the smallest of a wrong question's answer, 0.86.
NEAR_TIE = 0.75


class Judge(Protocol):
    """The interface of `Replay`; tests have their own."""

    def margin(self, prompt: str, answer: Asked) -> float: ...


class Replay:
    """The target in this process; it reads answers and does not write."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._tokenizer = engine, load_tokenizer(model)
        self._ids = {spell(self._tokenizer, token): token for token in range(len(self._tokenizer))}

    @classmethod
    @contextmanager
    def of(cls, config: EngineConfig) -> Iterator[Replay]:
        engine = build_engine(config)
        try:
            yield cls(engine, config.model)
        finally:
            engine.shutdown()

    def margin(self, prompt: str, answer: Asked) -> float:
        """The largest gap, in logits, between the likeliest token and the token of ``answer`` at one position."""
        written = [self._ids[token] for token in answer.written]
        if answer.is_complete and answer.finish == "stop":
            written.append(next(iter(self._engine.model.info.eos_token_ids)))
        if not written:
            return 0.0
        tokens = read_chat([Message("user", prompt)], self._tokenizer).tokens
        sequence = self._engine.open(SequenceRequest(tokens, len(written), SamplingParams(temperature=0))).result()
        try:
            self._engine.submit(prefill(sequence)).result()
            return self._engine.submit(_margin(sequence, written)).result()
        finally:
            self._engine.close(sequence)


def _margin(sequence: Sequence, written: list[int]) -> Task[float]:
    worst = 0.0
    for token in written:  # one by one, as plain decoding does
        logits = yield ForwardRequest(sequence, sequence.pending(), 1)
        assert logits is not None
        worst = max(worst, float(logits[0].max() - logits[0, token]))
        sequence.output.append(token)
    return worst


class Checker:
    """Compares answers with those that a client alone got, and replays those that differ."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.alone: dict[Question, Asked] = {}

    async def learn(self, questions: list[Question]) -> None:
        """Asks each question alone, one after another."""
        async with new_client() as http:
            for question in questions:
                asked = await ask(http, self._url, question, "short")
                if not asked.is_complete:
                    raise RuntimeError(f"{question.text!r} asked alone: {asked.status} {asked.error}")
                self.alone[question] = asked

    def judge(self, answers: list[Asked], replay: Judge, new: int) -> dict[str, Any]:
        """Counts the answers that are identical (to the answer alone, or to the replay), near ties, mixed up, or lost.

        Answers about new documents take long to replay, so only ``new`` of them are replayed.
        """
        counts = dict.fromkeys(("checked", "identical", "near_ties", "mixed_up", "lost", "not_compared"), 0)
        margins: dict[tuple[Question, tuple[bytes, ...], bool], float] = {}  # the same answer comes often
        examples = []
        for asked in answers:
            counts["lost"] += asked.is_lost
            if not asked.written or (not asked.is_complete and asked.kind != "cancelled"):
                continue
            if asked.question not in self.alone:
                new -= 1
                if new < 0:
                    counts["not_compared"] += 1
                    continue
            counts["checked"] += 1
            margin = 0.0
            if not self._is_as_alone(asked):
                key = (asked.question, tuple(asked.written), asked.is_complete)
                if key not in margins:
                    margins[key] = replay.margin(asked.question.prompt, asked)
                margin = margins[key]
            verdict = "identical" if margin == 0 else "near_ties" if margin <= NEAR_TIE else "mixed_up"
            counts[verdict] += 1
            if verdict == "mixed_up":
                examples.append({"question": asked.question.text, "got": asked.text, "margin": round(margin, 3)})
        ties = [margin for margin in margins.values() if margin <= NEAR_TIE]
        return counts | {
            "replayed": len(margins),
            "tokens_replayed": sum(len(written) for _, written, _ in margins),
            "largest_near_tie": round(max(ties, default=0.0), 3),
            "counts_as_mixed_up_above": NEAR_TIE,
            "examples": examples[:5],
        }

    def control(self, replay: Judge) -> dict[str, Any]:
        """The margins of the answers that a client alone got: beside their own questions, and beside others."""
        questions = list(self.alone)
        others = questions[2:] + questions[:2]  # neighbours may be about the same document
        own = [replay.margin(question.prompt, self.alone[question]) for question in questions]
        wrong = [replay.margin(other.prompt, self.alone[q]) for q, other in zip(questions, others, strict=True)]
        return {
            "answers": len(questions),
            "largest_beside_its_own_question": round(max(own), 3),
            "least_beside_another": round(min(wrong), 3),
            "median_beside_another": round(statistics.median(wrong), 3),
        }

    def _is_as_alone(self, asked: Asked) -> bool:
        alone = self.alone.get(asked.question)
        if alone is None or asked.kind == "slow":  # a slow reader's answer is longer than the others
            return False
        if asked.kind == "cancelled":
            return alone.written[: len(asked.written)] == asked.written
        return (alone.written, alone.finish) == (asked.written, asked.finish)
