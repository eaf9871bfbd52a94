"""RULER's tracing and aggregation: variable tracking, common words and frequent words.

Source: Hsieh et al., "RULER", 2024, and its `variable_tracking.py`, `common_words_extraction.py` and
`freq_words_extraction.py`.
"""

from __future__ import annotations

import math
import random
import string
from itertools import pairwise

from pydantic.dataclasses import dataclass

from deployments.evaluation.task import OPTIONS, TaskSettings
from deployments.evaluation.tasks.ruler import NOISE, Ruler, Sample
from deployments.evaluation.tasks.ruler_words import pairs, single

_SHORT = 4_096  # tokens, below which common words are repeated less often


@dataclass(config=OPTIONS)
class VariableTracking(Ruler):
    """Variable tracking, "vt": which variables get a value by ``hops`` assignments among noise, after an example."""

    name: str = "ruler_vt"
    hops: int = 4
    max_tokens = 30

    def sizes(self, limit: int) -> tuple[int, int]:
        return self.hops + 1, limit

    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        example, names = self._one(generator, 10, letters=3)
        asked, variables = self._one(generator, size, letters=5)
        before = f"{example.prompt} {' '.join(names)}\n\n{asked.before}"
        return Sample(before, asked.context, asked.behind, asked.query, variables)

    def _one(self, generator: random.Random, size: int, *, letters: int) -> tuple[Sample, list[str]]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(generator.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(generator.randint(10_000, 99_998))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {source}" for source, name in pairwise(names)]
        lines = [NOISE] * size
        at = sorted(generator.sample(range(size), len(chain)))
        for offset, (i, assignment) in enumerate(zip(at, chain, strict=True)):
            lines.insert(i + offset, assignment)
        query = f"Find all variables that are assigned the value {value} in the text above."
        answer = (
            f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
            f"assigned the value {value}, they are:"
        )
        before = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        return Sample(before, "\n".join(lines), f"\nQuestion: {query} {answer}", query, names), names


@dataclass(config=OPTIONS)
class CommonWords(Ruler):
    """Common words, "cwe": the ten words of a numbered list that stand there most often, after one example.

    They are repeated 30 times and the others 3 times; below 4,096 tokens 6 times and once. Pieces are different words.
    """

    name: str = "ruler_cwe"
    max_tokens = 120

    def sizes(self, limit: int) -> tuple[int, int]:
        return 11, len(pairs())

    def prepare(self, settings: TaskSettings) -> None:
        self._words, self._more = single(), pairs()
        self._is_short = settings.context_tokens is not None and settings.context_tokens < _SHORT

    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        example = self._one(generator, *((20, 3, 1) if self._is_short else (40, 10, 3)))
        asked = self._one(generator, size, *((6, 1) if self._is_short else (30, 3)))
        shown = " ".join(f"{i}. {word}" for i, word in enumerate(example.outputs, start=1))
        return asked._replace(before=f"{example.prompt} {shown}\n{asked.before}")

    def _one(self, generator: random.Random, size: int, often: int, seldom: int) -> Sample:
        words = generator.sample(self._words if size <= len(self._words) else self._more, size)
        common, others = words[:10], words[10:]
        listed = common * often + others * seldom
        generator.shuffle(listed)
        query = "What are the 10 most common words in the above list?"
        return Sample(
            "Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n",
            " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1)),
            f"\nQuestion: {query} Answer: The top 10 words that appear most often in the list are:",
            query,
            common,
        )


@dataclass(config=OPTIONS)
class FrequentWords(Ruler):
    """Frequent words, "fwe": the three most frequent of made-up words, whose numbers fall as in a Zeta law of 2.

    The most frequent of all is "...", which is noise. Pieces are words of the text.
    """

    name: str = "ruler_fwe"
    max_tokens = 50

    def sizes(self, limit: int) -> tuple[int, int]:
        return 40, limit  # of 40 the fourth most frequent stands there once

    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        vocabulary: dict[str, None] = {"...": None}
        while len(vocabulary) < max(5, int(math.sqrt(size))):
            vocabulary["".join(generator.choices(string.ascii_lowercase, k=6))] = None
        coded = list(vocabulary)
        zeta = math.pi**2 / 6
        listed = [word for rank, word in enumerate(coded, start=1) for _ in range(int(size / rank**2 / zeta))]
        generator.shuffle(listed)
        query = "What are the three most frequently appeared words in the above coded text?"
        return Sample(
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. ",
            " ".join(listed),
            f"\nQuestion: Do not provide any explanation. Please ignore the dots '....'. {query} "
            "Answer: According to the coded text above, the three most frequently appeared words are:",
            query,
            coded[1:4],
        )
