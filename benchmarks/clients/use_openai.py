"""openai: everything that the server has of OpenAI's API."""

import base64
import json
import time

import numpy as np
from harness import CITY, MESSAGES, MODEL, V1, WEATHER, check, feature, greedy, is_city, main
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=V1, api_key="none", max_retries=0)
ASK = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
TOOL = {"type": "function", "function": WEATHER}


class City(BaseModel):
    city: str


@feature("chat")
def chat():
    check(client.chat.completions.create(**ASK).choices[0].message.content, greedy())


@feature("stream")
def stream():
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), greedy())
    check(chunks[-1].usage.completion_tokens, 16)


@feature("tools")
def tools():
    for more in ({"tool_choice": "required"}, {"tool_choice": "required", "stream": True}):
        answer = client.chat.completions.create(**{**ASK, "max_tokens": 60}, tools=[TOOL], **more)
        if "stream" in more:
            calls = [call for c in answer for call in c.choices[0].delta.tool_calls or []]
        else:
            calls = answer.choices[0].message.tool_calls
        is_city(calls[0].function.arguments)


@feature("structured output")
def structured():
    answer = client.chat.completions.parse(**{**ASK, "max_tokens": 60}, response_format=City)
    check(isinstance(answer.choices[0].message.parsed, City), True)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    is_city(client.chat.completions.create(**ASK, response_format=form).choices[0].message.content)


@feature("logprobs")
def logprobs():
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3).choices[0]
    check("".join(entry.token for entry in answer.logprobs.content), answer.message.content)


@feature("completions")
def completions():
    body = {"model": MODEL, "prompt": ["Once", "Twice"], "max_tokens": 4, "temperature": 0}
    both = client.completions.create(**body, echo=True, logprobs=1).choices
    check([choice.text[:5] for choice in both], ["Once" + both[0].text[4], "Twice"])
    check(both[0].logprobs.token_logprobs[0], None)
    check(len(client.completions.create(**body | {"prompt": "Once", "temperature": 1}, best_of=3).choices), 1)


@feature("responses")
def responses():
    asked = {"model": MODEL, "input": MESSAGES, "temperature": 0, "max_output_tokens": 16}
    response = client.responses.create(**asked)
    check(response.output_text, greedy())
    with client.responses.stream(**asked) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    check("".join(deltas), response.output_text)
    check(client.responses.retrieve(response.id).output_text, response.output_text)
    follow = client.responses.create(**{**asked, "input": "Again."}, previous_response_id=response.id)
    check(follow.usage.input_tokens > response.usage.input_tokens, True)
    parsed = client.responses.parse(**{**asked, "max_output_tokens": 60}, text_format=City)
    check(isinstance(parsed.output_parsed, City), True)


@feature("embeddings")
def embeddings():
    one, two = (client.embeddings.create(model=MODEL, input="A cat.", encoding_format=f) for f in ("float", "base64"))
    other = two.data[0].embedding
    other = np.frombuffer(base64.b64decode(other), "<f4") if isinstance(other, str) else np.array(other)
    check(bool(np.abs(np.array(one.data[0].embedding) - other).max() < 1e-6), True)


@feature("files")
def files():
    stored = client.files.create(file=("colours.txt", b"The door is green. The roof is red."), purpose="user_data")
    check(stored.id in [file.id for file in client.files.list()], True)
    check(client.files.content(stored.id).read(), b"The door is green. The roof is red.")
    content = [{"type": "file", "file": {"file_id": stored.id}}, {"type": "text", "text": "Which colour has the door?"}]
    answer = client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": content}]})
    item = {"role": "user", "content": [{"type": "input_file", "file_id": stored.id},
                                        {"type": "input_text", "text": "Which colour has the door?"}]}  # fmt: skip
    same = client.responses.create(model=MODEL, input=[item], temperature=0, max_output_tokens=16)
    check(same.output_text, answer.choices[0].message.content)
    check(client.files.delete(stored.id).deleted, True)


@feature("uploads")
def uploads():
    data = b"The door is green. The roof is red." * 4000
    upload = client.uploads.upload_file_chunked(
        file=data, filename="colours.txt", bytes=len(data), mime_type="text/plain", purpose="user_data", part_size=2**16
    )
    check(upload.status, "completed")
    check(client.files.content(upload.file.id).read(), data)
    client.files.delete(upload.file.id)


@feature("batches")
def batches():
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ASK}
    lines = [json.dumps(line), json.dumps(line | {"custom_id": "b", "body": {**ASK, "top_p": 9.0}})]
    source = client.files.create(file=("asked.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=source.id, endpoint=line["url"], completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    check((batch.status, batch.request_counts.completed, batch.request_counts.failed), ("completed", 1, 1))
    answer = json.loads(client.files.content(batch.output_file_id).text)
    check(answer["response"]["body"]["choices"][0]["message"]["content"], greedy())
    failed = json.loads(client.files.content(batch.error_file_id).text)
    check((failed["custom_id"], failed["response"]["status_code"]), ("b", 400))
    for stored in (source.id, batch.output_file_id, batch.error_file_id):
        client.files.delete(stored)


@feature("errors")
def errors():
    for wrong, kind in (({"model": "gpt-x"}, NotFoundError), ({"top_p": 9.0}, BadRequestError)):
        try:
            client.chat.completions.create(**{**ASK, **wrong})
        except kind as error:
            json.dumps(error.body)
        else:
            raise AssertionError(f"{wrong} was answered")


main()
