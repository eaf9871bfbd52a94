"""Reasoning that a model writes before its answer: how its family marks it, and the reader that takes it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deployments.schemas import ignored
from deployments.schemas.body import Body
from deployments.schemas.marks import REASONING, special_marks
from deployments.schemas.tools import template_of
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 32  # tokens at the end of a prompt, in which a template opens the reasoning


class ReasoningFormat(NamedTuple):
    """``opening`` reasoning ``closing`` answer. With ``is_open`` the prompt ends with the opening.

    ``marks`` are those of the two that are special tokens (`special_marks`).
    """

    opening: str
    closing: str
    is_open: bool = False
    marks: Mapping[str, int] = {}

    def before(self, grammar: str) -> str:
        """``grammar`` behind reasoning, which it does not hold."""
        from rapid.sampling.grammar import after_reasoning  # here, since it loads PyTorch

        return after_reasoning(grammar, self.opening, self.closing, is_open=self.is_open, marks=self.marks)


def reasoning_format(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> ReasoningFormat | None:
    """How the model marks its reasoning behind ``prompt``, as template or tokens say; None: it has none."""
    template, tokens = template_of(tokenizer), tokenizer.get_added_vocab()
    for opening, closing in REASONING:
        if closing in template or (closing in tokens and opening in tokens):
            end = str(tokenizer.decode(prompt[-_TAIL:])).rstrip()
            return ReasoningFormat(opening, closing, end.endswith(opening), dict(special_marks(tokenizer)))
    return None


class ThinkingOption(Body):
    """Whether the model is to reason, where its chat template leaves that open."""

    ignores = ignored.THINKING_OPTION

    type: Literal["enabled", "disabled"]

    def template_kwargs(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """
        Raises:
            InvalidRequest: the model cannot do otherwise.
        """
        wanted = self.type == "enabled"
        if "enable_thinking" in template_of(tokenizer):
            return {"enable_thinking": wanted}
        if wanted != (reasoning_format(tokenizer, []) is not None):
            raise InvalidRequest(f"thinking: this model {'never' if wanted else 'always'} reasons", param="thinking")
        return {}


class ReasoningReader:
    """Separates reasoning from the answer while both are written; white space at their borders belongs to neither.

    What does not begin with the opening is answer, all of it.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._place = "inside" if form.is_open else "before"
        self._held = ""  # text that may be part of a mark
        self._is_begun = False  # whether something of the present part was given out

    @property
    def is_reasoning(self) -> bool:
        return self._place == "inside"

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that ``text`` adds."""
        self._held += text
        if self._place == "before":
            self._begin()
        if self._place == "before":
            return "", ""
        if self._place == "inside":
            reasoning, is_closed = self._inside()
            return reasoning, self._behind() if is_closed else ""
        return "", self._behind()

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        rest, self._held = self._held, ""
        if self._place == "inside":
            return rest.strip() if not self._is_begun else rest.rstrip(), ""
        return "", rest if self._place == "before" or self._is_begun else ""

    def _begin(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._form.opening):
            self._place, self._held = "inside", begun.removeprefix(self._form.opening)
        elif not self._form.opening.startswith(begun):
            self._place, self._is_begun = "behind", True  # the answer's white space is its own

    def _inside(self) -> tuple[str, bool]:
        """(reasoning that is certain, whether it ends with it)."""
        if not self._is_begun:
            self._held = self._held.lstrip()
        reasoning, closing, rest = self._held.partition(self._form.closing)
        if closing:
            self._place, self._held, self._is_begun = "behind", rest, False
            return reasoning.rstrip(), True
        end = len(self._held) - _cut_mark(self._held, self._form.closing)
        end = len(self._held[:end].rstrip())
        shown, self._held = self._held[:end], self._held[end:]
        self._is_begun |= bool(shown)
        return shown, False

    def _behind(self) -> str:
        answer, self._held = self._held if self._is_begun else self._held.lstrip(), ""
        self._is_begun |= bool(answer)
        return answer


def _cut_mark(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may begin ``mark``."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
