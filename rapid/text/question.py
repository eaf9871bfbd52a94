"""Finds the question in a long message: behind the document, before it, or in the frame of a prompt template.

Only the message's edges are looked at. They are cut into *units*: paragraphs, and apart from them each line that a
template writes (a label such as "Question:", a tag, a ruled line) and each line that is a question. A unit asks if it
is labelled as a question, or if all of its sentences are questions.

What asks behind the document is the query. If nothing does, it is what asks before the document, then a task that
announces the document ("Summarise this:"), and then the last paragraph, as a person would write it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_EDGE = 6_000  # characters of the beginning, and of the end, that are looked at
_UNITS = 4  # of a frame on one side, marks apart
_WORDS = 60  # of a unit that belongs to a frame; two characters of Chinese or Japanese count as one
_BRIEF_WORDS = 12  # of an instruction behind a document whose question stands before it

_QUESTION = (
    r"(?:user )?question|(?:user )?query|q|frage|pregunta|consulta|domanda|vraag|pergunta|fråga|pytanie|soru|вопрос|"
    r"запрос|питання|问题|問題|质问|質問|질문|प्रश्न|सवाल|سؤال|السؤال|câu hỏi"
)
_OTHER = (  # of an answer, or of a document
    r"(?:helpful |your |final )?answer|a|response|assistant|output|antwort|respuesta|réponse|risposta|antwoord|"
    r"resposta|svar|odpowiedź|cevap|ответ|відповідь|答案|回答|답변|उत्तर|الجواب|trả lời|"
    r"context(?: information)?|contexts|documents?|text|passages?|sources?|article|transcript|information|background|"
    r"kontext|dokument|contexto|documento|contexte|контекст|документ|上下文|文档|文檔|文章|文書|資料"
)
_AROUND = r"[\s#*_>]{0,4}"
_QUESTION_LABEL = re.compile(rf"{_AROUND}(?:{_QUESTION}){_AROUND}[:：]{_AROUND}", re.IGNORECASE)
_QUESTION_TAG = re.compile(rf"\s*[<\[](?:{_QUESTION})[>\]]\s*", re.IGNORECASE)
_OTHER_LABEL = re.compile(rf"{_AROUND}(?:{_OTHER}){_AROUND}[:：]{_AROUND}", re.IGNORECASE)
_TAG = r"[<\[]/?[\w /|:-]{1,40}[>\]]"
# A line that says nothing of its own: ruled, a fence, a tag, a heading of one word, or the label of what follows.
_MARK = re.compile(rf"\s*(?:[-=*_~`\"'.]{{3,}}\w{{0,12}}|{_TAG}|#{{1,4}} \w{{1,20}}|{_OTHER_LABEL.pattern})\s*", re.I)
_CLOSING_TAG = re.compile(r"\s*[<\[]/[\w |:-]{1,40}[>\]]\s*$")
_ASKS = re.compile(r"(?:[?？؟⸮\u037e՞፧]|か[。．]?|[吗呢][。．]?)[)\]*]*$")
# A full stop that ends no sentence: of a title or an abbreviation, of an initial, or inside a number or a name.
_INNER_STOP = (
    r"(?<=\b(?:Mr|Ms|Dr|St|Sr|Jr|No|vs|Eq|Co|Mt))\.|(?<=\b(?:Mrs|Fig|Inc|Ltd|e\.g|i\.e))\.|(?<=\bProf)\.|"
    r"(?<=\b[A-Z])\.|\.(?=\w)"
)
_SENTENCE = re.compile(rf"(?:{_INNER_STOP}|[^.!?。！？؟\n])+[.!?。！？؟]*[\"'”’»)\]*]*")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\(?\w{1,3}[.)])[ \t]+", re.MULTILINE)
_BLANK_LINE = re.compile(r"\S\s*?\n[ \t\r]*\n\s*?\S")


class Framed(NamedTuple):
    """A message in three parts, which together are the message, and the query that the first and the last part hold.

    ``asks`` is False if nothing there is a question or announces the document, so that the query is a guess.
    """

    before: str
    document: str
    behind: str
    query: str
    asks: bool


@dataclass(frozen=True)
class _Unit:
    start: int
    end: int
    text: str

    @cached_property
    def is_mark(self) -> bool:
        return _MARK.fullmatch(self.text) is not None

    @cached_property
    def num_words(self) -> int:
        return len(self.text.split()) + sum(character >= "\u2e80" for character in self.text) // 2

    @cached_property
    def bare(self) -> str:
        """The unit without its label and its tags."""
        text = self.text.strip()
        label = _QUESTION_TAG.match(text) or _QUESTION_LABEL.match(text)
        return _CLOSING_TAG.sub("", text[label.end() :] if label else text).strip()

    @cached_property
    def asks(self) -> bool:
        if self.is_mark or self.num_words > _WORDS or not self.bare:
            return False
        labelled = _QUESTION_LABEL.match(self.text) or _QUESTION_TAG.match(self.text)
        sentences = _sentences(self.bare)
        return labelled is not None or (bool(sentences) and all(map(_ASKS.search, sentences)))

    @property
    def announces(self) -> bool:
        return not self.is_mark and self.text.rstrip().endswith((":", "："))


def find_question(text: str) -> Framed:
    """Cuts ``text`` into the document and what stands around it. A text of one line has no question of its own."""
    behind = list(reversed(_near(reversed(_units(text, at_end=True)))))
    before = _near(_units(text, at_end=False))
    asks = True
    last = next((unit for unit in reversed(behind) if not unit.is_mark), None)
    if any(unit.asks for unit in behind) or (last is not None and questions(last.bare)):
        behind = _from_first(behind, lambda unit: unit.asks or unit is last)
        asking = [unit for unit in behind if unit.asks] or [unit for unit in behind if unit is last]
        before = _until_last(before, lambda unit: unit.is_mark or unit.announces)
    elif asking := [unit for unit in before if unit.asks] or [unit for unit in before if unit.announces][:1]:
        before = _until_last(before, lambda unit: unit.asks or unit.is_mark or unit.announces)
        instruction = last if last is not None and last.num_words <= _BRIEF_WORDS else None
        behind = _from_first(behind, lambda unit: unit is instruction)
    else:
        paragraphs = [unit for unit in _units(text, at_end=True) if not unit.is_mark]
        before, asking, asks = [], paragraphs[-1:], False
        behind = _from_first(_units(text, at_end=True), lambda unit: unit in asking)
    first, end = before[-1].end if before else 0, behind[0].start if behind else len(text)
    document = text[first:end].strip()
    if not document or not asking:
        return whole(text)
    first = text.index(document, first)  # the white space around a document belongs to the frame
    end = first + len(document)
    if not before:
        first = 0
    query = "\n".join(unit.bare for unit in asking)
    return Framed(text[:first], text[first:end], text[end:], query, asks)


def whole(text: str) -> Framed:
    """``text`` as a document without a question."""
    return Framed("", text, "", "", asks=False)


def questions(text: str) -> str:
    """The sentences of a short ``text`` that ask, and are not quoted; "" if there are none."""
    return " ".join(filter(_ASKS.search, _sentences(text))) if len(text) < _EDGE else ""


def _near(units: Iterable[_Unit]) -> list[_Unit]:
    """The units next to an edge that may belong to a frame: short ones, and marks between them."""
    near: list[_Unit] = []
    for unit in units:
        if not unit.is_mark and (unit.num_words > _WORDS or sum(not u.is_mark for u in near) == _UNITS):
            break
        if len(near) == 4 * _UNITS:
            break
        near.append(unit)
    return near


def _from_first(units: list[_Unit], belongs: Callable[[_Unit], bool]) -> list[_Unit]:
    """``units`` from the first that ``belongs`` on, and the marks right before it."""
    start = next((i for i, unit in enumerate(units) if belongs(unit)), len(units))
    while start and units[start - 1].is_mark:
        start -= 1
    return units[start:]


def _until_last(units: list[_Unit], belongs: Callable[[_Unit], bool]) -> list[_Unit]:
    """``units`` up to the last that ``belongs``."""
    return units[: max((i + 1 for i, unit in enumerate(units) if belongs(unit)), default=0)]


def _units(text: str, *, at_end: bool) -> list[_Unit]:
    """The units of one edge of ``text``, in order. Without blank lines in it each line is a unit."""
    low, high = (max(0, len(text) - _EDGE), len(text)) if at_end else (0, min(len(text), _EDGE))
    edge = text[low:high]
    joining = _BLANK_LINE.search(edge) is not None
    units: list[_Unit] = []
    open_paragraph = False
    position = low
    for line in edge.splitlines(keepends=True):
        unit = _Unit(position, position + len(line), line)
        position = unit.end
        if not line.strip():
            open_paragraph = False
            continue
        alone = unit.is_mark or _QUESTION_LABEL.match(line) or _QUESTION_TAG.match(line) or unit.asks
        if open_paragraph and joining and not alone and not _OTHER_LABEL.match(line):
            units[-1] = _Unit(units[-1].start, unit.end, text[units[-1].start : unit.end])
        else:
            units.append(unit)
        open_paragraph = not alone
    # What the edge cuts off is the document's.
    if low > 0 or high < len(text):
        units = units[1:] if at_end else units[:-1]
    return units


def _sentences(text: str) -> list[str]:
    found = (sentence.strip() for sentence in _SENTENCE.findall(_LIST_ITEM.sub("", text)))
    return [sentence for sentence in found if any(character.isalnum() for character in sentence)]
