"""outlines: its adapters for OpenAI and for vLLM, with schemas, choices, expressions and grammars."""

import re
from typing import Literal

import outlines
from harness import MODEL, QUESTION, V1, check, feature, greedy, is_city, main
from openai import OpenAI
from outlines.types import CFG, Regex
from pydantic import BaseModel

HOW = {"max_tokens": 60, "temperature": 0}
client = OpenAI(base_url=V1, api_key="none", max_retries=0)
openai, vllm = outlines.from_openai(client, MODEL), outlines.from_vllm(client, MODEL)


class City(BaseModel):
    city: Literal["Rome", "Oslo"]


@feature("chat")
def chat():
    for model in (openai, vllm):
        check(model(QUESTION, max_tokens=16, temperature=0), greedy())


@feature("stream")
def stream():
    check("".join(vllm.stream(QUESTION, max_tokens=16, temperature=0)), greedy())
    is_city("".join(openai.stream(QUESTION, City, **HOW)))


@feature("structured output")
def structured():
    for model in (openai, vllm):
        is_city(model(QUESTION, City, **HOW))
    check(vllm(QUESTION, Literal["red", "green"], **HOW) in ("red", "green"), True)
    check(bool(re.fullmatch("[a-c]{3}", vllm(QUESTION, Regex("[a-c]{3}"), **HOW))), True)
    check(vllm(QUESTION, CFG('start: "red" | "green"'), **HOW) in ("red", "green"), True)


main()
