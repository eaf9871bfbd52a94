"""Documents with questions whose passages are known: real meetings, articles, and paragraphs in two languages."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.common.results import DATA

Span = tuple[int, int]  # of a document's characters


class Asked(NamedTuple):
    question: str
    gold: list[Span]


class Document(NamedTuple):
    source: str
    text: str
    questions: list[Asked]


def documents() -> Iterator[Document]:
    """QMSum's meetings, LooGLE's articles (short dependency), and XQuAD in English and Chinese as one document each."""
    yield from meetings()
    yield from articles()
    for language in ("en", "zh"):
        yield paragraphs(language)


def meetings() -> Iterator[Document]:
    """A turn a line. A question's gold are the turns that answer it."""
    for line in (DATA / "qmsum_test.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        meeting = json.loads(line)
        text, turns = "", []
        for turn in meeting["meeting_transcripts"]:
            start = len(text)
            text += f"{turn['speaker']}: {turn['content']}\n"
            turns.append((start, len(text)))
        questions = [
            Asked(
                each["query"],
                [(turns[int(a)][0], turns[min(int(b), len(turns) - 1)][1]) for a, b in each["relevant_text_span"]],
            )
            for each in meeting["specific_query_list"]
        ]
        yield Document("qmsum", text, questions)


def articles() -> Iterator[Document]:
    """Gold is the evidence, found without regard to white space; a question whose evidence is not there is left out."""
    for line in (DATA / "loogle_shortdep_qa.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        article = json.loads(line)
        text = article["input"]
        places = [i for i, character in enumerate(text) if not character.isspace()]
        bare = "".join(text[i] for i in places)
        questions = []
        for pair in ast.literal_eval(article["qa_pairs"]):
            sentences = ("".join(sentence.split()) for sentence in pair["S"].split(". "))
            starts = [(bare.find(sentence), len(sentence)) for sentence in sentences if len(sentence) > 20]
            gold = [(places[start], places[start + length - 1] + 1) for start, length in starts if start >= 0]
            if gold:
                questions.append(Asked(pair["Q"], gold))
        yield Document("loogle", text, questions)


def paragraphs(language: str) -> Document:
    """Gold is the answer."""
    corpus = json.loads((DATA / f"xquad.{language}.json").read_text(encoding="utf-8"))
    text, questions = "", []
    for paragraph in (each for article in corpus["data"] for each in article["paragraphs"]):
        for asked in paragraph["qas"]:
            [answer, *_] = asked["answers"]
            start = len(text) + answer["answer_start"]
            questions.append(Asked(asked["question"], [(start, start + len(answer["text"]))]))
        text += paragraph["context"] + "\n\n"
    return Document(f"xquad_{language}", text, questions)
