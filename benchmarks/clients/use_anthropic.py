"""anthropic: Messages, whole and streamed, tools, documents, counting."""

import base64

from anthropic import Anthropic
from harness import CITY, MESSAGES, MODEL, URL, check, feature, greedy, main

client = Anthropic(base_url=URL, api_key="none", max_retries=0)
ASK = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "extra_body": {"temperature": 0}}


@feature("chat")
def chat():
    check(client.messages.create(**ASK).content[0].text, greedy())


@feature("stream")
def stream():
    with client.messages.stream(**ASK) as events:
        check("".join(events.text_stream), greedy())
        check(events.get_final_message().usage.output_tokens, 16)


@feature("tools")
def tools():
    tool = {"name": "weather", "description": "How the weather is in a city", "input_schema": CITY}
    more = {"tools": [tool], "tool_choice": {"type": "any"}}
    answer = client.messages.create(**{**ASK, "max_tokens": 60}, **more)
    call = next(block for block in answer.content if block.type == "tool_use")
    check(call.input["city"] in ("Rome", "Oslo"), True)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "snow"}]}
    history = [*MESSAGES, {"role": "assistant", "content": answer.content}, result]
    client.messages.create(**{**ASK, "messages": history}, tools=[tool])


@feature("files")
def files():
    data = base64.b64encode(b"The door is green.").decode()
    source = {"type": "base64", "media_type": "text/plain", "data": data}
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "The door is green."},
    }
    asked = {"type": "text", "text": "Which colour has the door?"}
    texts = [
        client.messages.create(**{**ASK, "messages": [{"role": "user", "content": [each, asked]}]}).content[0].text
        for each in (document, {"type": "document", "source": source})
    ]
    check(texts[0], texts[1])


@feature("count tokens")
def count():
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    used = client.messages.create(**ASK).usage
    check(counted, used.input_tokens + used.cache_read_input_tokens)


main()
