"""MT-Bench-101: the last turn of a dialogue whose earlier turns are spread over a long history, rated by a judge.

The history is filled with turns of other dialogues, as in the RAPID paper, section 4.4: the model has to find what the
last turn refers to. Source of the dialogues, the abilities and the scale: Bai et al., "MT-Bench-101", 2024. The judge
is asked in words of our own, because the benchmark's prompts are long; ratings are comparable within a run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import f1
from deployments.evaluation.metrics.verdicts import rating
from deployments.evaluation.reading import Source, find, records
from deployments.evaluation.task import OPTIONS, ChatMessage, Question, Task, TaskSettings, chosen

SOURCE = Source(("mtbench101.jsonl",))
FIELDS = ("task", "id", "history")
CONTEXT_TOKENS = 122_000
MAX_TOKENS = 512
_TURN_TOKENS = 10  # of a chat template around two messages
_ROOM_LEFT = 64  # tokens, for which no dialogue is looked for

# What each of the benchmark's thirteen abilities asks of the last answer.
ABILITIES = {
    "CM": "It remembers what was said earlier, uses it where it matters, and does not contradict it.",
    "AR": "It understands what pronouns and other references of the last message stand for in the dialogue.",
    "SI": "The task was set earlier and its material comes now: the answer does that task with that material.",
    "TS": "The subject changed: the answer is about the new one, and nothing of the old one is carried over.",
    "CC": "Earlier turns are distractions: the answer is right for the last message alone.",
    "CR": "It rewrites the earlier answer as asked, and keeps its content.",
    "FR": "It gives the earlier answer the form that is asked for, and keeps its content.",
    "SC": "The user doubts an answer that was wrong: the answer corrects it.",
    "SA": "The user doubts an answer that was right: the answer stands by it, with reasons.",
    "MR": "The mathematics is right, and each step is explained; the reference solution says what is right.",
    "GR": "The reasoning is right, and each step is explained; the reference solution says what is right.",
    "IC": "Where the request is unclear it asks for what is missing; where that was given it answers fully.",
    "PI": "It goes on in the role and the rules that the dialogue has set up, and brings it further.",
}
_WITH_REFERENCE = ("MR", "GR")
_FIRST_IS_GIVEN = ("FR", "CR", "AR", "SA", "SC", "CM")  # abilities whose first turn only prepares the others

Turn = dict[str, str]  # user and bot


@dataclass(config=OPTIONS)
class MTBench101(Task):
    """``turns``: the fewest turns of a dialogue that is asked about; with more than four as in the RAPID paper: 5.

    ``rated``: the last turn; or "all", as in the benchmark: a dialogue counts as its worst turn, and a limit counts
    dialogues. ``spread``: whether turns of other dialogues stand between.
    """

    name: str = "mtbench101"
    turns: int = 2
    rated: Literal["last", "all"] = "last"
    spread: bool = True
    metric = "rating"
    best = 10.0

    def __post_init__(self) -> None:
        self.judge = DialogueJudge()

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        rows = records(find(SOURCE, self.name, settings), FIELDS)
        asked = [row for row in rows if len(row["history"]) >= self.turns]
        encode = cache(lambda text: len(settings.tokenizer.encode(text)))

        def tokens(turn: Turn) -> int:
            return encode(turn["user"]) + encode(turn["bot"]) + _TURN_TOKENS

        # The dialogues between are the same for all questions, whose prompts thus begin alike.
        others = random.Random(settings.seed).sample(rows, len(rows)) if self.spread else []
        for row in chosen(asked, _identity, settings):
            last = len(row["history"]) - 1
            first = last if self.rated == "last" else 1 if row["task"] in _FIRST_IS_GIVEN else 0
            for turn in range(first, last + 1):
                yield self._question(row, turn, others, tokens, settings)

    def combine(self, scores: Sequence[float]) -> float:
        return min(scores)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"f1_to_reference": f1(answer, question.references)}

    def _question(
        self,
        row: dict[str, Any],
        turn: int,
        others: list[dict[str, Any]],
        tokens: Callable[[Turn], int],
        settings: TaskSettings,
    ) -> Question:
        earlier, last = row["history"][:turn], row["history"][turn]
        room = (settings.context_tokens or CONTEXT_TOKENS) - sum(map(tokens, earlier)) - tokens({**last, "bot": ""})
        history = _fitting([other["history"] for other in others if other is not row], room, tokens)
        generator = random.Random(f"{settings.seed}/{_identity(row)}")
        at = sorted(generator.randint(0, len(history)) for _ in earlier)
        for i, own in reversed(list(zip(at, earlier, strict=True))):
            history.insert(i, own)
        said = [
            {"role": role, "content": one[who]}
            for one in history
            for role, who in (("user", "user"), ("assistant", "bot"))
        ]
        return Question(
            id=f"{_identity(row)}/{turn + 1}",
            item=_identity(row),
            messages=(*said, {"role": "user", "content": last["user"]}),
            references=(last["bot"],),
            max_tokens=MAX_TOKENS,
            query=last["user"],
            group=row["task"],
            facts={"ability": row["task"], "dialogue": earlier, "turns": len(history) + 1},
        )


@dataclass(config=OPTIONS)
class DialogueJudge:
    """Rates the last answer from 1 to 10, by the dialogue alone: what it was spread over is left out."""

    max_tokens: int = 512

    def messages(self, question: Question, answer: str) -> tuple[ChatMessage, ...]:
        ability = str(question.facts["ability"])
        rules = (
            "You are an impartial judge. Rate the last answer of the assistant in the dialogue below, and only that "
            "one, from 1 (it fails) to 10 (it is perfect).\nWhat counts: "
            + ABILITIES.get(ability, "It is right, helpful, and fits the dialogue.")
            + '\nExplain your rating in a few sentences. End with it in exactly this form: "Rating: [[6]]".'
        )
        turns = [f"User: {turn['user']}\n\nAssistant: {turn['bot']}" for turn in question.facts["dialogue"]]
        turns.append(f"User: {question.query}\n\nAssistant: {answer}")
        dialogue = "\n\n".join(turns)
        reference = f"\n\nReference solution:\n{question.references[0]}" if ability in _WITH_REFERENCE else ""
        return (
            {"role": "system", "content": rules},
            {"role": "user", "content": f"<dialogue>\n{dialogue}\n</dialogue>{reference}"},
        )

    def scores(self, verdict: str) -> dict[str, float]:
        return {"rating": rating(verdict)}


def _identity(row: dict[str, Any]) -> str:
    return f"{row['task']}-{row['id']}"


def _fitting(dialogues: list[list[Turn]], room: int, tokens: Callable[[Turn], int]) -> list[Turn]:
    """The turns of the dialogues that fit into ``room``, each dialogue whole, the first that fits first."""
    found: list[Turn] = []
    for dialogue in dialogues:
        size = sum(map(tokens, dialogue))
        if size <= room:
            found += dialogue
            room -= size
        if room < _ROOM_LEFT:
            break
    return found
