"""When to retrieve anew while the answer is written (`refresh` "auto"; after FLARE, arXiv 2305.06983)."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from rapid.speculation.draft import VerifyResult

_ENDS = re.compile(r"[.!?](?=\s|$)|[。！？\n]")
_UNSURE = 0.5  # the mean confidence of a sentence's draft tokens that is below it
_HOPE, _HOPE_WEIGHT = 0.8, 4.0  # the assumed acceptance before the first sentence, and how many tokens it is worth


class SentenceWatch:
    """Follows the output sentence by sentence: what it says, how sure the drafter was of it, how much of it stood."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._confidences: list[float] = []
        self._num_accepted = 0
        self._stood, self._tried = _HOPE * _HOPE_WEIGHT, _HOPE_WEIGHT  # in the sentences before

    def observe(self, result: VerifyResult) -> str | None:
        """Takes a round in; returns the last sentence if it ended and the drafter's passages did not help with it.

        They did not if the drafter was unsure of its tokens, and fewer of them stood than in the sentences before.
        """
        self._text += str(self._tokenizer.decode(result.tokens, skip_special_tokens=True))
        self._confidences += result.confidences[: result.num_accepted + 1]
        self._num_accepted += result.num_accepted
        ends = [match.end() for match in _ENDS.finditer(self._text)]
        if not ends:
            return None
        before = self._stood / self._tried
        num_tried = len(self._confidences)
        is_unsure = num_tried > 0 and sum(self._confidences) / num_tried < _UNSURE
        falls = self._num_accepted < before * num_tried
        sentence, self._text = self._text[: ends[-1]].strip(), self._text[ends[-1] :]
        self._stood, self._tried = self._stood + self._num_accepted, self._tried + num_tried
        self._confidences, self._num_accepted = [], 0
        return sentence or None if is_unsure and falls else None
