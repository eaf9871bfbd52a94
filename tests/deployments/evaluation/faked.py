"""A task and a runner that compute nothing, for runs whose every answer is known beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.evaluation.answers import Answer, AnswersFile
from deployments.evaluation.config import Evaluation, Row, parse_evaluation
from deployments.evaluation.run import Asked, Ran, Run
from deployments.evaluation.runner import Ask, Passage, Reply, Runner
from deployments.evaluation.summary import Summary, summarize
from deployments.evaluation.task import Question, Task, TaskSettings

ROWS = [
    {"name": "LC", "rapid": {"strategy": "autoregressive"}},
    {"name": "RAG", "rapid": {"strategy": "rag"}},
    {"name": "RAPID", "rapid": {"strategy": "rapid"}},
]


class Words(Task):
    """Right is what contains a reference; three questions a document."""

    name, metric = "words", "match"

    def __init__(self, number: int = 6) -> None:
        self._number = number

    def questions(self, settings: TaskSettings | None = None) -> Iterable[Question]:
        for i in range(self._number):
            yield Question(
                id=f"q{i}",
                messages=({"role": "user", "content": f"Document {i // 3}. Question {i}?"},),
                references=(f"right {i}",),
                max_tokens=8,
                query=f"Question {i}?",
                document=f"d{i // 3}",
                group="even" if i % 2 == 0 else "odd",
            )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"match": float(question.references[0] in answer)}


class FakeRunner:
    """Answers by the seed alone. Row RAPID is always right, others by chance; each answer takes what its row takes."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.asked: list[Ask] = []
        self._wait = wait

    def refusal(self, row: Row) -> str | None:
        return None

    def about(self) -> dict[str, Any]:
        return {"name": "fake"}

    async def answer(self, ask: Ask) -> Reply:
        self.asked.append(ask)
        self._wait()
        number = int(ask.query.removeprefix("Question ").removesuffix("?"))
        is_right = ask.row.name == "RAPID" or hashlib.sha256(str(ask.seed).encode()).digest()[0] % 2
        text = f"right {number}" if is_right else f"wrong {number}"
        seconds = 0.5 if ask.row.name == "RAPID" else 1.0
        return Reply(
            text=text,
            finish="stop",
            tokens=10,
            first_s=0.1,
            total_s=seconds,
            decoded=10,
            decode_s=seconds,
            is_clocked_here=False,
            has_read=ask.unread,
            pieces=[("accepted", text[:3]), ("recovered", text[3:])],
            origins={"accepted": 4, "recovered": 6},
            statistics={
                "emitted": 10,
                "drafted": 8,
                "accepted": 4,
                "fallback": None,
                "timings_ms": {"drafting": 0, "verification": seconds * 1e3, "transport": 0, "total": seconds * 2e3},
            },
            passages=[Passage(0, 9, 0.5, f"passage of {ask.query}")],
        )


class Silent:
    """Watches and says nothing."""

    def __init__(self, told: Callable[[Answer], None] = lambda _: None) -> None:
        self._told = told
        self.estimated: list[float] = []
        self.left: list[float] = []
        self.began: list[tuple[int, int]] = []
        self.left_out: dict[str, str] = {}

    def begins(self, num_answers: int, num_known: int) -> None:
        self.began.append((num_answers, num_known))

    def opens(self, system: str) -> None: ...

    def leaves_out(self, row: Row, why: str, num_answers: int) -> None:
        self.left_out[row.name] = why

    def estimates(self, total_s: float) -> None:
        self.estimated.append(total_s)

    def answers(self, answer: Answer, left_s: float) -> None:
        self.left.append(left_s)
        self._told(answer)


def evaluation(**fields: Any) -> Evaluation:
    return parse_evaluation({"tasks": [{"name": "words"}], "rows": ROWS} | fields, source="test")


async def run(
    asked_for: Evaluation, folder: Path, runner: Runner, watcher: Silent | None = None, task: Task | None = None
) -> Summary:
    """Runs ``asked_for`` with ``runner`` for every system, and summarises it."""
    task = task or Words()
    asked = [Asked(choice, task, list(task.questions(None))) for choice in asked_for.tasks]  # type: ignore[arg-type]

    @contextmanager
    def open_runner(name: str) -> Iterator[Runner]:
        yield runner

    with AnswersFile.open(folder) as answers:
        ran: Ran = await Run(asked_for, asked, answers, None, watcher or Silent()).ask(open_runner)
        return summarize(asked_for, asked, answers.known.values(), ran)
