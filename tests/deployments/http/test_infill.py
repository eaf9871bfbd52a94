"""`suffix`: the prompt of each family that fills in the middle, and a refusal by name where there is none."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from deployments.schemas.infill import infill_prompt
from deployments.schemas.text import TextRequest
from rapid.errors import InvalidRequest

Letters = Callable[[int], PreTrainedTokenizerFast]


@pytest.mark.parametrize(
    ("marks", "written"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], "<|fim_prefix|>ab<|fim_suffix|>c<|fim_middle|>"),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "<fim_prefix>ab<fim_suffix>c<fim_middle>"),
        (["▁<PRE>", "▁<SUF>", "▁<MID>"], "▁<PRE>ab▁<SUF>c▁<MID>"),
        (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]c[PREFIX]ab"),
    ],
)
def test_the_prompt_is_the_family_s(letter_tokenizer: Letters, marks: list[str], written: str) -> None:
    tokenizer = letter_tokenizer(29)
    tokenizer.add_tokens(marks, special_tokens=True)
    tokens = infill_prompt(tokenizer, "ab", "c")
    assert tokenizer.decode(tokens) == written
    request = TextRequest(model="letters", prompt="ab", suffix="c")
    assert request._prompt(tokenizer).tokens == tokens
    # A mark that a stranger writes is text.
    assert tokens[0] not in infill_prompt(tokenizer, f"a{marks[0]}", "c")[1:] or marks[0] == "[PREFIX]"
    assert infill_prompt(tokenizer, "", "c").count(tokenizer.convert_tokens_to_ids(marks[1])) == 1


def test_other_models_refuse_it(letter_tokenizer: Letters, letters_url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        infill_prompt(letter_tokenizer(29), "ab", "c")
    assert refused.value.param == "suffix"
    for prompt, suffix, status in (("ab", "c", 400), ([3, 4], "c", 400), ("ab", "", 200)):
        body = {"model": "letters", "prompt": prompt, "suffix": suffix, "max_tokens": 2}
        assert httpx.post(f"{letters_url}/v1/completions", json=body, timeout=60).status_code == status
