"""What clients of other servers send by default, and how they expect to be answered."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import threading
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from deployments.heartbeat import beating
from deployments.http.multipart import with_plain_name
from deployments.http.responses import ResponseFormatter, server_sent
from deployments.schemas import ignored
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import Completion
from deployments.schemas.events import Started
from deployments.schemas.messages import FileReference
from deployments.schemas.text import TextRequest
from deployments.schemas.tools import CallFormat, CallReader, Tool
from deployments.serve.edge import middlewares
from rapid.events import Delta, Finish, Statistics

USER = {"role": "user", "content": "Say hi."}
CHAT: dict[str, Any] = {"model": "bytes", "messages": [USER], "max_tokens": 3, "temperature": 0, "ignore_eos": True}


def ask(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **more}, timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def usual(bytes_url: str) -> str:
    return text_of(ask(bytes_url))


def neutral_values(table: ignored.Ignorable) -> list[tuple[str, Any]]:
    return [(name, values[0] if values else {"any": ["thing"]}) for name, values in table.items()]


@pytest.mark.parametrize(("field", "value"), neutral_values(ignored.CHAT), ids=str)
def test_what_asks_for_nothing_is_accepted_and_named(bytes_url: str, usual: str, field: str, value: Any) -> None:
    answer = ask(bytes_url, **{field: value})
    assert text_of(answer) == usual
    assert answer.json()["rapid"]["ignored"] == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, 7.5) for name, values in ignored.CHAT.items() if values]
    + [("length_penalty", True), ("skip_special_tokens", False), ("use_beam_search", 0)],
)
def test_what_would_change_the_answer_is_refused_by_name(bytes_url: str, field: str, value: Any) -> None:
    answer = ask(bytes_url, **{field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_fields_that_are_ignored_are_none_that_work() -> None:
    for kind, table in ((ChatRequest, ignored.CHAT), (TextRequest, ignored.TEXT)):
        assert not table.keys() & kind.model_fields.keys()


@pytest.mark.parametrize(
    "more",
    [{"top_k": -1}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}, {"store": None}],
)
def test_other_spellings_of_the_usual(bytes_url: str, usual: str, more: dict[str, Any]) -> None:
    answer = ask(bytes_url, **more)
    assert (text_of(answer), answer.json()["rapid"]["ignored"]) == (usual, [])


def test_no_limit_is_the_configured_one() -> None:
    request = ChatRequest.model_validate({**CHAT, "max_tokens": -1})
    assert request.tokens_to_write() is None
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({**CHAT, "max_tokens": -2})


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"annotations": []}, ["messages.annotations"]),
        ({"id": "m1", "opts": {"visible": True}}, ["messages.id", "messages.opts"]),
        ({"reasoning_content": "hm"}, []),
        ({"refusal": None}, []),
        ({"content": [{"type": "text", "text": "Hi.", "cache_control": {"type": "ephemeral"}}]},
         ["messages.content.cache_control"]),
    ],
)  # fmt: skip
def test_a_chat_that_began_elsewhere_goes_on(bytes_url: str, said: dict[str, Any], named: list[str]) -> None:
    def chat(**more: Any) -> httpx.Response:
        return ask(bytes_url, messages=[USER, {"role": "assistant", "content": "Hi.", **more}, USER])

    answer = chat(**said)
    assert text_of(answer) == text_of(chat())
    assert answer.json()["rapid"]["ignored"] == named


def test_a_refusal_is_what_was_said(bytes_url: str) -> None:
    texts = [
        text_of(ask(bytes_url, messages=[USER, {"role": "assistant", field: "I cannot."}, USER]))
        for field in ("content", "refusal")
    ]
    assert texts[0] == texts[1]


def test_calls_in_the_history_need_no_perfect_json(bytes_url: str) -> None:
    broken = {**CALL, "index": 0, "function": {"name": "f", "arguments": '{"a": '}}
    history = [
        USER,
        {"role": "assistant", "tool_calls": [broken]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    assert text_of(ask(bytes_url, messages=history))


TOOLS = [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in "fg"]
TAGGED, BARE = (
    CallFormat("<tool_call>\n", "arguments", "\n</tool_call>", "<tool_call>"),
    CallFormat("", "parameters", ""),
)


@pytest.mark.parametrize(
    ("form", "written", "text", "called"),
    [
        (TAGGED, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><tool_call>{"name": "x"}</tool_call>',
         '<tool_call>{"name": "x"}</tool_call>', ["f"]),
        (TAGGED, '<tool_call>{broken}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
         "<tool_call>{broken}</tool_call>", ["g"]),
        (BARE, '{"name": "f", "parameters": {}}; {"name": "x", "parameters": {}}',
         '; {"name": "x", "parameters": {}}', ["f"]),
        (BARE, '{"name": "f", "parameters": {}}; {"name": "g", "para', '; {"name": "g", "para', ["f"]),
        (BARE, '{"name": "x", "parameters": {}}', '{"name": "x", "parameters": {}}', []),
        (TAGGED, '<tool_call>{"name": "f", "arguments": {}}</tool_call> or <tool_call>{"name": "g"', None, ["f"]),
    ],
)  # fmt: skip
def test_a_broken_call_among_good_ones_is_text(
    form: CallFormat, written: str, text: str | None, called: list[str]
) -> None:
    reader = CallReader(TOOLS, form)
    shown = reader.push(written)
    rest, calls = reader.finish()
    assert [call["function"]["name"] for call in calls] == called
    if text is not None:
        assert (shown + rest).strip() == text.strip()
    for name in {"f", "g", "x"} - set(called):  # nothing that was written is lost
        assert (f'"{name}"' in written) == (f'"{name}"' in shown + rest)


def test_a_body_behind_an_offer_of_http2_arrives(bytes_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    middlewares()  # as Serve's proxy calls it

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        await PlainTextResponse(str(len(body)))(scope, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(count, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=30) as connection:
            offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
            connection.sendall(f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n{offer}\r\nhello".encode())
            answer = HTTPResponse(connection)
            answer.begin()
            body = answer.read()
        server.should_exit = True
        thread.join()
    assert (answer.status, body) == (200, b"5")


def test_gzip_is_read_and_bounded(bytes_url: str, usual: str) -> None:
    def post(body: bytes, encoding: str = "gzip") -> httpx.Response:
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        return httpx.post(f"{bytes_url}/v1/chat/completions", content=body, headers=headers, timeout=60)

    packed = gzip.compress(json.dumps(CHAT).encode())
    assert text_of(post(packed)) == usual
    assert post(packed, "br").status_code == 415
    assert post(packed[:-9]).status_code == post(b"{}").status_code == 400
    assert post(gzip.compress(json.dumps(CHAT).encode() + b" " * 10**7)).status_code == 413


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/health", "/"])
def test_head_is_get_without_the_body(bytes_url: str, path: str) -> None:
    got, head = httpx.get(bytes_url + path), httpx.head(bytes_url + path)
    assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_an_overflow_is_told_in_words_that_clients_know(bytes_url: str) -> None:
    answer = ask(bytes_url, messages=[{"role": "user", "content": "a " * 9000}])
    assert "This model's maximum context length is" in answer.json()["error"]["message"]


@pytest.mark.parametrize("digits", ["aGVsbG8h", "aGVs\nbG8h\r\n", "aGVsbG8h=", "data:text/plain;base64,aGVs\n bG8h"])
def test_base64_with_line_ends_or_without_padding(digits: str) -> None:
    assert FileReference(file_data=digits).data("x") == b"hello!"
    short = base64.b64encode(b"hello").decode()
    assert FileReference(file_data=short.rstrip("=")).data("x") == b"hello"


@pytest.mark.parametrize(
    ("media", "disposition", "name"),
    [
        ("multipart/form-data", 'filename="a.txt"', "a.txt"),
        ("Multipart/Form-Data", 'filename="a.txt"', "a.txt"),
        ("multipart/form-data", "filename*=utf-8''d%C3%B6c.txt", "döc.txt"),
        ("multipart/form-data", "filename*=UTF-8''a%3Bb%22c.txt", 'a;b"c.txt'),
        ("multipart/form-data", "filename=\"=?utf-8?B?ZMO2Yy50eHQ=?=\"; filename*=utf-8''d%C3%B6c.txt", "döc.txt"),
        ("multipart/form-data", 'filename="=?utf-8?Q?d=C3=B6c.txt?="', "döc.txt"),
    ],
)  # fmt: skip
def test_a_file_s_name_in_any_spelling(bytes_url: str, media: str, disposition: str, name: str) -> None:
    body = (
        f'--B\r\nContent-Disposition: form-data; name="file"; {disposition}\r\n\r\nhello\r\n--B--\r\n'.encode()
    )  # fmt: skip
    answer = httpx.post(f"{bytes_url}/v1/files", content=body, headers={"Content-Type": f"{media}; boundary=B"})
    assert answer.json().get("filename") == name, answer.text
    httpx.delete(f"{bytes_url}/v1/files/{answer.json()['id']}")


def test_a_name_in_no_known_way_stays_as_it_came() -> None:
    for disposition in (b"form-data; name=\"f\"; filename*=no-such''%61", b'form-data; filename="=?no-such?B?ZA==?="'):
        assert with_plain_name(disposition) == disposition


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["Say", "hi there", "you"], [[1, 2], [3, 4, 5], [6]]], ids=["texts", "tokens"])
def test_several_prompts_in_one_request(bytes_url: str, prompts: list[Any], stream: bool) -> None:
    def complete(**more: Any) -> httpx.Response:
        body = {"model": "bytes", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "echo": True, **more}
        return httpx.post(f"{bytes_url}/v1/completions", json=body, timeout=60)

    alone = [complete(prompt=prompt).json() for prompt in prompts]
    expected = [one["choices"][0]["text"] for one in alone for _ in range(2)]
    answer = complete(
        prompt=prompts, n=2, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {})
    )
    assert answer.status_code == 200, answer.text
    if stream:
        texts = [""] * 6
        chunks = [json.loads(event[6:]) for event in events_of(answer.text) if event.startswith("data: {")]
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        usage = chunks[-1]["usage"]
    else:
        texts, usage = [choice["text"] for choice in answer.json()["choices"]], answer.json()["usage"]
    assert texts == expected
    assert usage["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert usage["completion_tokens"] == 18
    assert complete(prompt=[*prompts, prompts[0] * 9000]).status_code == 400


def events_of(text: str) -> list[str]:
    return [event for event in text.split("\n\n") if event]


def test_a_stream_that_waits_says_so() -> None:
    may_go_on = asyncio.Event()

    async def slow() -> Any:
        yield Started(1)
        await may_go_on.wait()
        yield Delta([1], ["a"], 0, 0, "none", 0.0, 0.0, 0.0, [])
        yield Finish("", "stop", Statistics("autoregressive"))

    async def read() -> list[str]:
        completion: Completion = TextRequest(model="m", prompt="p", stream=True)
        sent = server_sent(ResponseFormatter(completion), beating(slow(), every_s=0.001))
        events = []
        async for event in sent:
            events.append(event)
            if len(events) == 3:
                may_go_on.set()
        return events

    events = asyncio.run(read())
    assert events[:3] == [": keep-alive\n\n"] * 3
    assert [event for event in events if event.startswith("data: {")] and events[-1] == "data: [DONE]\n\n"


def test_headers_come_before_the_first_token_and_tell_nginx(bytes_url: str) -> None:
    with httpx.stream("POST", f"{bytes_url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        assert events_of(answer.read().decode())[-1] == "data: [DONE]"


def test_usage_on_every_chunk(bytes_url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    with httpx.stream(
        "POST", f"{bytes_url}/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options}
    ) as answer:
        chunks = [json.loads(event[6:]) for event in events_of(answer.read().decode()) if event.startswith("data: {")]
    written = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert written[0] == 0 and written == sorted(written) and written[-1] == 3
    assert chunks[-1]["rapid"]["ignored"] == ["stream_options.include_obfuscation"]


def test_the_documentation_names_what_is_ignored() -> None:
    text = Path("docs/openai_api.md").read_text(encoding="utf-8").partition("## Fields without effect")[2]
    tables = [table for name, table in vars(ignored).items() if name.isupper() and isinstance(table, dict)]
    assert len(tables) > 12
    assert not [name for table in tables for name in table if isinstance(name, str) and f"`{name}`" not in text]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/threads/t/runs"])
def test_what_is_not_served_says_what_to_do_instead(bytes_url: str, path: str) -> None:
    for answer in (httpx.get(bytes_url + path), httpx.post(bytes_url + path, json={})):
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].startswith(f"there is no {path}: ")
    assert httpx.get(f"{bytes_url}/v1/audiobook").json()["error"]["message"] == "there is no /v1/audiobook"


def test_a_chat_with_a_file_has_the_tokens_that_its_answer_has_read(bytes_url: str) -> None:
    inline = {"type": "file", "file": {"file_data": base64.b64encode(b"hello " * 40).decode(), "filename": "a.txt"}}
    messages = [{"role": "user", "content": [inline, {"type": "text", "text": "Who?"}]}]
    counted = httpx.post(f"{bytes_url}/tokenize", json={"messages": messages}, timeout=60)
    assert counted.status_code == 200, counted.text
    asked = ask(bytes_url, messages=messages, rapid={"strategy": "autoregressive"})
    assert counted.json()["count"] == asked.json()["usage"]["prompt_tokens"] > 240
    gone = [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-" + "0" * 32}}]}]
    answer = httpx.post(f"{bytes_url}/tokenize", json={"messages": gone}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "messages.0.content.0.file.file_id")


def test_files_of_one_second_are_listed_in_their_order(bytes_url: str) -> None:
    def upload(i: int) -> str:
        sent = {"file": (f"{i}.txt", b"text %d" % i)}
        answer = httpx.post(f"{bytes_url}/v1/files", files=sent, data={"purpose": "user_data"}, timeout=60)
        return str(answer.json()["id"])

    mine = [upload(i) for i in range(6)]
    listed = [file["id"] for file in httpx.get(f"{bytes_url}/v1/files?order=asc").json()["data"]]
    assert [name for name in listed if name in mine] == mine
    page = httpx.get(f"{bytes_url}/v1/files?limit=2&after={mine[4]}").json()
    assert [file["id"] for file in page["data"]] == [mine[3], mine[2]] and page["has_more"]
    for name in mine:
        httpx.delete(f"{bytes_url}/v1/files/{name}", timeout=60)
