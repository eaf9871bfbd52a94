"""Short answers against references: exact match and token F1 as SQuAD defines them, and the same by characters.

Sources: SQuAD's evaluation script; ∞Bench's `compute_scores.py` for Chinese, where each character is a token.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀"
    "｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WITHOUT_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)

Normalize = Callable[[str], list[str]]


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and needless white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def words(text: str) -> list[str]:
    """The normalised words of ``text``."""
    return normalized(text).split()


def characters(text: str) -> list[str]:
    """The characters of ``text``, lower case, without punctuation and white space: the tokens of Chinese."""
    return list("".join(text.lower().translate(_WITHOUT_ANY_PUNCTUATION).split()))


def f1(answer: str, references: Sequence[str], tokens: Normalize = words) -> float:
    """The best F1 of ``answer`` against a reference: 2PR/(P+R) over the bags of their tokens, in 0..1."""
    return max((_f1(tokens(answer), tokens(reference)) for reference in references), default=0.0)


def exact_match(answer: str, references: Sequence[str], tokens: Normalize = words) -> float:
    """1 if ``answer`` has the same tokens as a reference, else 0."""
    return float(any(tokens(answer) == tokens(reference) for reference in references))


def contains_any(answer: str, references: Sequence[str], tokens: Normalize = words) -> float:
    """1 if a reference stands in ``answer`` once both are normalised, else 0.

    It is `best_subspan_em` of "Lost in the Middle". Words are joined by a space and compared as text, so that a
    reference may begin inside a word.
    """
    joined = " ".join(tokens(answer))
    return float(any(" ".join(tokens(reference)) in joined for reference in references))


def _f1(answer: list[str], reference: list[str]) -> float:
    same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * same / (len(answer) + len(reference)) if same else 0.0
