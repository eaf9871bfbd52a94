"""The kinds of work that `benchmarks.workload` measures."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.common.work import documents, kinds, prompts, repeated


def test_what_counts_as_repeated() -> None:
    line = list(range(10))
    assert repeated(line) == 0
    assert repeated([*line, *line]) == pytest.approx(3 / 13)  # the n-grams across the seam are new
    assert repeated([5] * 20) == pytest.approx(12 / 13)
    assert repeated(line, known=[99, *line[2:]]) == pytest.approx(1 / 3)
    assert repeated([1, 2]) == 0


def test_prompts_have_their_length_and_half_of_the_documents_are_not_tuned_on(
    chat_tokenizer: PreTrainedTokenizerFast, data_file: Callable[[str], Path]
) -> None:
    data_file("qmsum_test.jsonl")
    assert [document.is_tuned for document in documents()] == [False, True] * 3
    for kind in kinds().values():
        asked = list(prompts(kind, chat_tokenizer, 2000, 7))
        assert asked[0][0].name == asked[6][0].name and asked[0][1] != asked[6][1]
        for document, question, prompt in asked:
            assert 1600 < len(prompt.tokens) < 2200, (kind.name, document.name)
            assert prompt.contents and question in chat_tokenizer.decode(prompt.tokens)
