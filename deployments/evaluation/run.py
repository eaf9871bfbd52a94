"""Asks all that is to be asked, once: system by system, document by document, so that what was read serves all rows."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from deployments.evaluation.answers import Answer, AnswersFile, Key
from deployments.evaluation.config import Evaluation, Row, TaskChoice
from deployments.evaluation.estimate import Cell, Estimate, Kind
from deployments.evaluation.judging import JudgeClient
from deployments.evaluation.runner import Ask, Reply, Runner, reading
from deployments.evaluation.task import EvaluationError, Question, Task
from rapid.errors import RapidError

OpenRunner = Callable[[str], AbstractContextManager[Runner]]  # by the system's name
_PROBED = 2  # usual questions of each task that are asked before all others, to know how long these will take
_BUSY = (429, 502, 503, 504)
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Asked:
    """A task, and the questions of it that are asked."""

    choice: TaskChoice
    task: Task
    questions: Sequence[Question]

    def of(self, row: Row) -> Sequence[Question]:
        """The questions that ``row`` is asked: all that it can be, or some that lie evenly among them."""
        questions = self.questions
        if row.retrieve_from != "read":
            questions = [question for question in questions if self.source(question, row)]
        if row.limit is None or row.limit >= len(questions):
            return questions
        return [questions[i * len(questions) // row.limit] for i in range(row.limit)]

    def source(self, question: Question, row: Row) -> str:
        """What ``row`` retrieves from beside what the target reads; "" if there is nothing else."""
        if row.retrieve_from == "read":
            return ""
        if row.retrieve_from == "whole":
            return question.whole
        at, number = self.questions.index(question), len(self.questions)
        after = (self.questions[(at + number // 2 + i) % number] for i in range(number))
        other = next((one for one in after if _document(one) != _document(question)), None)
        return max((message["content"] for message in other.messages), key=len) if other else ""


def _document(question: Question) -> str:
    return question.document or question.id


class Work(NamedTuple):
    """An answer that is wanted."""

    asked: Asked
    question: Question
    row: Row
    temperature: float
    kind: Kind

    @property
    def key(self) -> Key:
        return Key(self.asked.choice.label, self.question.id, self.row.name, self.temperature)

    @property
    def cell(self) -> Cell:
        return Cell(self.asked.choice.label, self.row.name, self.row.strategy, self.temperature, self.kind)


class Watcher(Protocol):
    """Is told how a run goes on. Times in seconds."""

    def begins(self, num_answers: int, num_known: int) -> None: ...
    def opens(self, system: str) -> None: ...
    def leaves_out(self, row: Row, why: str, num_answers: int) -> None: ...
    def estimates(self, total_s: float) -> None: ...
    def answers(self, answer: Answer, left_s: float) -> None: ...


@dataclass
class Ran:
    """What is known of a run besides its answers. ``took_s`` is the time of the answers of this process alone."""

    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    estimated_s: float | None = None
    took_s: float = 0.0


def plan(evaluation: Evaluation, asked: Sequence[Asked], system: str) -> tuple[list[Work], list[Work]]:
    """The work of ``system`` in its order: probes, and all else, task by task. A question's rows stand together."""
    rows = [row for row in evaluation.rows if row.system == system]
    number = 0 if evaluation.systems[system].url else evaluation.unread  # a server knows what it was asked before
    unread = Counter(asked[i * len(asked) // number].choice.label for i in range(number))
    wanted = {
        (each.choice.label, row.name): {question.id for question in each.of(row)} for each in asked for row in rows
    }
    read: set[tuple[str, ...]] = set()

    def work(each: Asked, question: Question) -> Iterator[Work]:
        label = each.choice.label
        for row in rows:
            if question.id not in wanted[label, row.name]:
                continue
            # One row reads a document for all, and the first that retrieves embeds it: each has its own first time.
            document = (label, row.name, each.source(question, row) or _document(question))
            for temperature in evaluation.temperatures:
                kind: Kind = "known" if document in read else "new"
                if question in each.questions[: unread[label]] and temperature == evaluation.temperatures[0]:
                    kind = "unread"
                else:
                    read.add(document)
                yield Work(each, question, row, temperature, kind)

    probed = [(each, unread[each.choice.label] + _PROBED) for each in asked]
    probes = [one for each, number in probed for question in each.questions[:number] for one in work(each, question)]
    others = [one for each, number in probed for question in each.questions[number:] for one in work(each, question)]
    return probes, others


class Run:
    """One evaluation, as far as ``answers`` does not hold it yet.

    Raises:
        EvaluationError: the answers that are there are of another run.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        asked: Sequence[Asked],
        answers: AnswersFile,
        judge: JudgeClient | None,
        watcher: Watcher,
    ) -> None:
        self._evaluation, self._answers, self._judge, self._watcher = evaluation, answers, judge, watcher
        names = [name for name in evaluation.systems if any(row.system == name for row in evaluation.rows)]
        self._plans = {name: plan(evaluation, asked, name) for name in names}
        everything = [work for parts in self._plans.values() for part in parts for work in part]
        self._estimate = Estimate(work.cell for work in everything if work.key not in answers.known)
        for work in everything:
            if known := answers.known.get(work.key):
                if known.run != evaluation.identity(work.row, work.asked.choice):
                    raise EvaluationError(
                        f"the answers of row {work.row.name} to {work.asked.choice.label} were written with other "
                        "settings: choose another --output, or remove them"
                    )
                self._estimate.learn(work.cell, known.total_s)
        watcher.begins(len(everything), sum(work.key in answers.known for work in everything))

    async def ask(self, open_runner: OpenRunner) -> Ran:
        """Asks system by system.

        Raises:
            RapidError: a system failed. What was answered stays, and the next run goes on from there.
        """
        ran, started = Ran(), time.perf_counter()
        for name, (probes, others) in self._plans.items():
            self._watcher.opens(name)
            with open_runner(name) as runner:
                ran.systems[name] = runner.about()
                self._leave_out(name, runner, ran, [*probes, *others])
                await self._ask(runner, [work for work in probes if work.row.name not in ran.left_out])
                estimated_s = time.perf_counter() - started + self._left_s()
                if ran.estimated_s is None:
                    ran.estimated_s = estimated_s
                self._watcher.estimates(estimated_s)  # again for each system, which may be slower than the first
                await self._ask(runner, [work for work in others if work.row.name not in ran.left_out])
        ran.took_s = time.perf_counter() - started
        return ran

    def _left_s(self) -> float:
        return (self._estimate.left_s() or 0.0) / self._evaluation.concurrency

    def _leave_out(self, system: str, runner: Runner, ran: Ran, everything: list[Work]) -> None:
        for row in self._evaluation.rows:
            if row.system == system and (why := runner.refusal(row)):
                ran.left_out[row.name] = why
                unasked = [work.cell for work in everything if work.row == row and work.key not in self._answers.known]
                for cell in unasked:
                    self._estimate.finish(cell)
                self._watcher.leaves_out(row, why, len(unasked))

    async def _ask(self, runner: Runner, all_work: Sequence[Work]) -> None:
        """Asks ``concurrency`` at a time, in order; the first failure ends all."""
        waiting = iter([work for work in all_work if work.key not in self._answers.known])

        async def worker() -> None:
            for work in waiting:
                answer = await self._answer(runner, work)
                self._answers.add(answer)
                self._estimate.finish(work.cell)
                self._estimate.learn(work.cell, answer.total_s)
                self._watcher.answers(answer, self._left_s())

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._evaluation.concurrency):
                    workers.create_task(worker())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _answer(self, runner: Runner, work: Work) -> Answer:
        asked, question, row = work.asked, work.question, work.row
        key = work.key
        started = time.perf_counter()
        seed = int.from_bytes(hashlib.sha256(repr((self._evaluation.seed, *key)).encode()).digest()[:4]) >> 1
        empty = Answer(*key, self._evaluation.identity(row, asked.choice), seed)
        ask = Ask(
            question.messages,
            question.max_tokens,
            row,
            work.temperature,
            seed,
            query=question.query,
            source=asked.source(question, row),
            unread=work.kind == "unread",
        )
        try:
            reply = await _patiently(runner, ask)
            text, first = reply.text, ""
            if question.then is not None:
                messages = question.then.messages(text)
                first = text
                text = (
                    await _patiently(runner, replace(ask, messages=messages, max_tokens=question.then.max_tokens))
                ).text
        except RapidError as error:
            if error.status >= 500 or error.status in _BUSY:
                raise
            return replace(empty, error=f"{error.code}: {error.message}", total_s=time.perf_counter() - started)
        scores, verdict = dict(asked.task.score(question, text)), ""
        if asked.task.judge is not None and self._judge is not None:
            judged, verdict = await self._judge.scores(asked.task.judge, question, text)
            scores |= judged
        is_shown = question in asked.questions[: self._evaluation.reported]
        if reply.has_read is None:  # a server that does not say so has read what is new to it
            reply = replace(reply, has_read=work.kind == "new")
        answer = _with(replace(empty, text=text, first=first, scores=scores, verdict=verdict), reply, is_shown=is_shown)
        return replace(answer, total_s=round(time.perf_counter() - started, 4))


async def _patiently(runner: Runner, ask: Ask) -> Reply:
    """The reply; a server that is busy is asked again a few times."""
    for pause_s in _PAUSES_S:
        try:
            return await runner.answer(ask)
        except RapidError as error:
            if error.status not in _BUSY:
                raise
            await asyncio.sleep(pause_s)
    return await runner.answer(ask)


def _with(answer: Answer, reply: Reply, *, is_shown: bool) -> Answer:
    statistics = reply.statistics
    return replace(
        answer,
        finish=reply.finish,
        tokens=reply.tokens,
        decoded=reply.decoded,
        decode_s=round(reply.decode_s, 4),
        is_clocked_here=reply.is_clocked_here,
        reading_s=round(reading(statistics) if statistics else reply.first_s, 4),
        has_read=reply.has_read,
        drafted=statistics.get("drafted", 0),
        accepted=statistics.get("accepted", 0),
        fallback=statistics.get("fallback"),
        origins=reply.origins,
        statistics=statistics,
        pieces=reply.pieces if is_shown else [],
        passages=reply.passages if is_shown else [],
    )
