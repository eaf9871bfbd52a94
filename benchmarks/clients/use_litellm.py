"""litellm: chat, stream, tools, structured output, embeddings, responses, and what its router makes of an overflow."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from harness import CITY, MESSAGES, MODEL, V1, WEATHER, check, feature, greedy, is_city, main

HOW = {"model": f"openai/{MODEL}", "api_base": V1, "api_key": "none", "num_retries": 0}
ASK = {**HOW, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}


@feature("chat")
def chat():
    check(litellm.completion(**ASK).choices[0].message.content, greedy())


@feature("stream")
def stream():
    check("".join(c.choices[0].delta.content or "" for c in litellm.completion(**ASK, stream=True)), greedy())


@feature("tools")
def tools():
    more = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
    answer = litellm.completion(**{**ASK, "max_tokens": 60}, **more)
    is_city(answer.choices[0].message.tool_calls[0].function.arguments)


@feature("structured output")
def structured():
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    is_city(litellm.completion(**ASK, response_format=form).choices[0].message.content)


@feature("responses")
def responses():
    response = litellm.responses(**HOW, input=MESSAGES, max_output_tokens=16, temperature=0)
    check(response.output[0].content[0].text, greedy())


@feature("embeddings")
def embeddings():
    check(len(litellm.embedding(**HOW, input=["A cat."], encoding_format="float").data), 1)


@feature("errors")
def errors():
    try:
        litellm.completion(**{**ASK, "messages": [{"role": "user", "content": "a " * 9000}]})
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("not recognised as an overflow")


main()
