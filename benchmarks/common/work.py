"""Kinds of work on real documents: what people ask of a long text, and how each request samples.

Half of the documents, the novels, are those that the other benchmarks use. On the other half nothing was tuned.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.common.results import DATA
from rapid.sampling.grammar import Framed, json_grammar
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.text.prompts import Message, Prompt, read_chat

_AROUND = 256  # tokens of a prompt that are not the document
_EXCERPT = 700  # characters that are edited
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "role": {"type": "string", "maxLength": 60},
        "said_or_done": {"type": "string", "maxLength": 160},
    },
    "required": ["name", "role", "said_or_done"],
    "additionalProperties": False,
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "people": {"type": "array", "items": _PERSON, "minItems": 4, "maxItems": 5},
    },
    "required": ["title", "people"],
    "additionalProperties": False,
}


class Document(NamedTuple):
    """``text`` from its beginning on, two subjects in it, and two questions with their answers."""

    name: str
    is_tuned: bool
    text: Callable[[], str]
    subjects: tuple[str, str]
    facts: tuple[tuple[str, str], tuple[str, str]]


def _novel(name: str, start: int) -> Callable[[], str]:
    return lambda: (DATA / name).read_text(encoding="utf-8")[start:]


def _meetings(first: int) -> Callable[[], str]:
    """A meeting of QMSum, and those behind it, for prompts that are longer than one."""

    def text() -> str:
        lines = (DATA / "qmsum_test.jsonl").read_text(encoding="utf-8").splitlines()[first : first + 3]
        turns = [turn for line in lines for turn in json.loads(line)["meeting_transcripts"]]
        return "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in turns)

    return text


def _article(title: str) -> Callable[[], str]:
    """An article of LooGLE, and the one behind it."""

    def text() -> str:
        lines = (DATA / "loogle_shortdep_qa.jsonl").read_text(encoding="utf-8").splitlines()
        articles = [json.loads(line) for line in lines]
        at = next(i for i, article in enumerate(articles) if article["title"] == title)
        return "\n\n".join(article["input"] for article in articles[at : at + 2])

    return text


def _fact(title: str, question: str) -> tuple[str, str]:
    lines = (DATA / "loogle_shortdep_qa.jsonl").read_text(encoding="utf-8").splitlines()
    article = next(article for line in lines if (article := json.loads(line))["title"] == title)
    answers = {pair["Q"]: str(pair["A"]) for pair in ast.literal_eval(article["qa_pairs"])}
    return question, answers[question]


def documents() -> list[Document]:
    """Six documents, by turns one that is not tuned on and one that is."""
    execution = "Execution of Nagaenthran K. Dharmalingam"
    return [
        Document(
            "QMSum: a committee on a law",
            False,
            _meetings(0),
            ("how the law protects children", "what the prosecutors will have to do"),
            (
                (
                    "What is the two-stage test in prosecutions?",
                    "First there must be enough evidence for a realistic prospect of conviction. Then the prosecution "
                    "must be in the public interest.",
                ),
                (
                    "What did Barry Hughes think about the legal framework?",
                    "That it would make things clearer for parents and professionals.",
                ),
            ),
        ),
        Document(
            "Pride and Prejudice",
            True,
            _novel("pride-and-prejudice.txt", 60_000),
            ("Mr. Darcy's character", "the Bingleys and their sisters"),
            (
                ("Who is ill at Netherfield?", "Jane Bennet, who caught a cold."),
                ("Who walks to Netherfield to see her?", "Her sister Elizabeth."),
            ),
        ),
        Document(
            "LooGLE: an execution",
            False,
            _article(execution),
            ("the appeals against the sentence", "what the public said about the case"),
            (
                _fact(execution, "Why was Nagaenthran's execution delayed?"),
                _fact(execution, "Why were protests made outside Malaysia's Parliament?"),
            ),
        ),
        Document(
            "Moby-Dick, at sea",
            True,
            _novel("moby-dick.txt", 200_000),
            ("Captain Ahab", "whales and how they are hunted"),
            (
                ("Who is the captain of the ship?", "Captain Ahab."),
                ("What does he want of his crew?", "That they hunt the white whale."),
            ),
        ),
        Document(
            "QMSum: a parliament",
            False,
            _meetings(7),
            ("the government's answer to the pandemic", "the people who are hit hardest"),
            (
                (
                    "What was the Prime Minister accused of?",
                    "Of locking down Parliament to avoid accountability, and of refusing to hold a first ministers' "
                    "meeting.",
                ),
                ("Which groups were said to be hit heavily?", "Aboriginal people, students, and rural residents."),
            ),
        ),
        Document(
            "Moby-Dick, ashore",
            True,
            _novel("moby-dick.txt", 30_000),
            ("Queequeg", "the inn and its landlord"),
            (
                ("Where does the narrator spend the night?", "At the Spouter-Inn in New Bedford."),
                ("With whom does he share a bed?", "With Queequeg, a harpooneer."),
            ),
        ),
    ]


@dataclass(frozen=True)
class Kind:
    """A kind of work: what is asked of a document as its ``i``-th question, and how the answer is sampled."""

    name: str
    sampling: SamplingParams
    ask: Callable[[Document, str, int], str]
    logits: LogitParams = LogitParams()  # noqa: RUF009 (frozen)
    turns: bool = False  # whether the document's questions were asked and answered before


def _edit(document: Document, passage: str, i: int) -> str:
    middle = len(passage) // (3 - i)
    excerpt = passage[middle:].partition("\n")[2][:_EXCERPT].rpartition(" ")[0].strip()
    change = ('write "&" for every "and"', "begin it with a title")[i]
    return f"Here is a part of it:\n\n{excerpt}\n\nWrite this part again, {change}, and change nothing else."


def kinds() -> dict[str, Kind]:
    """By letter."""
    greedy = SamplingParams(temperature=0)
    return {
        "a": Kind(
            "free answer",
            SamplingParams(temperature=0.7, top_p=0.9),
            lambda document, _, i: (
                f"What do you think about {document.subjects[i]} here? Explain it in your own words, with reasons."
            ),
            LogitParams(repetition_penalty=1.1),
        ),
        "b": Kind("extractive question", greedy, lambda document, _, i: document.facts[i][0]),
        "c": Kind(
            "quoting with sources",
            greedy,
            lambda document, _, i: (
                f"Quote word for word the sentences that say most about {document.subjects[i]}, and say of each where "
                "in the text it stands."
            ),
        ),
        "d": Kind(
            "JSON under a schema",
            greedy,
            lambda document, _, i: (
                f"Who has to do with {document.subjects[i]}? Answer in JSON: a title, and people with name, role, and "
                "what they said or did."
            ),
            LogitParams(grammar=json_grammar(Framed(_SCHEMA))),
        ),
        "e": Kind("editing", greedy, _edit),
        "f": Kind(
            "dialogue",
            SamplingParams(temperature=0.7, top_p=0.9),
            lambda document, _, i: f"And what does all this say about {document.subjects[i]}?",
            turns=True,
        ),
        "g": Kind(
            "summary",
            SamplingParams(temperature=0.3),
            lambda document, _, i: f"Summarize in one paragraph what the text says about {document.subjects[i]}.",
        ),
    }


def prompts(
    kind: Kind, tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_questions: int
) -> Iterator[tuple[Document, str, Prompt]]:
    """(document, question, prompt of about ``num_tokens``): the first question of each document, then the second."""
    for n, document in enumerate(2 * documents()):
        if n == num_questions:
            return
        text = document.text()[: 8 * num_tokens]
        passage = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[: num_tokens - _AROUND])
        question = kind.ask(document, passage, n // 6)
        messages = [question]
        if kind.turns:
            messages = [*(part for fact in document.facts for part in fact), question]
        messages[0] = f"{passage}\n\n{messages[0]}"
        chat = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(messages)]
        yield document, question, read_chat(chat, tokenizer)


def repeated(tokens: list[int], known: list[int] | None = None, size: int = 8) -> float:
    """The share of the n-grams of ``tokens`` that came before in ``tokens``, or in ``known`` if that is given."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    if not grams:
        return 0.0
    if known is not None:
        seen = {tuple(known[i : i + size]) for i in range(len(known) - size + 1)}
        return sum(gram in seen for gram in grams) / len(grams)
    return 1 - len(set(grams)) / len(grams)


def settings_of(kind: Kind) -> dict[str, Any]:
    """How the kind samples, for a table of results."""
    logits = {"repetition_penalty": kind.logits.repetition_penalty, "grammar": kind.logits.grammar is not None}
    return {"temperature": kind.sampling.temperature, "top_p": kind.sampling.top_p, **logits}
