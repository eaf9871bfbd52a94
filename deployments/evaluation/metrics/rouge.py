"""ROUGE-L and ROUGE-Lsum, the F-measures of longest common subsequences.

Both are those of the package `rouge_score` without stemming, by which ∞Bench scores its summaries. Source: Lin,
"ROUGE", 2004, sections 3.1 and 3.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_NOT_A_LETTER = re.compile(r"[^a-z0-9]+")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The best F of ``answer`` against a reference, in 0..1: each is one sequence of words."""
    return max((_rouge_l(_tokens(answer), _tokens(reference)) for reference in references), default=0.0)


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """The best F of ``answer`` against a reference, in 0..1, by the union of each reference line's subsequences.

    A line is a sentence. A word counts at most as often as it stands in the answer.
    """
    return max((_rouge_lsum(_lines(answer), _lines(reference)) for reference in references), default=0.0)


def _tokens(text: str) -> list[str]:
    return _NOT_A_LETTER.sub(" ", text.lower()).split()


def _lines(text: str) -> list[list[str]]:
    return [_tokens(line) for line in text.split("\n") if line]


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return 0.0
    return _f_measure(_lengths(reference, answer)[-1][-1], len(answer), len(reference))


def _rouge_lsum(answer: list[list[str]], reference: list[list[str]]) -> float:
    num_answer, num_reference = sum(map(len, answer)), sum(map(len, reference))
    if not num_answer or not num_reference:
        return 0.0
    in_answer = Counter(word for line in answer for word in line)
    hits = 0
    for line in reference:
        union = sorted({i for other in answer for i in _common(line, other)})
        for word in (line[i] for i in union):
            if in_answer[word] > 0:
                hits += 1
                in_answer[word] -= 1
    return _f_measure(hits, num_answer, num_reference)


def _f_measure(hits: int, num_answer: int, num_reference: int) -> float:
    precision, recall = hits / num_answer, hits / num_reference
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _lengths(first: list[str], second: list[str]) -> list[list[int]]:
    """[len(first) + 1, len(second) + 1]: the length of the longest common subsequence of every two beginnings."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common(first: list[str], second: list[str]) -> list[int]:
    """Where the words of one longest common subsequence stand in ``first``: of several, the one `rouge_score` finds."""
    table = _lengths(first, second)
    i, j = len(first), len(second)
    found: list[int] = []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found
