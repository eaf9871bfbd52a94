"""`rapid chat`: a conversation goes on, whatever happens to one of its answers."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from served import MODEL, document

from deployments.cli.chat import Chat
from rapid.strategies import STRATEGIES

Run = Callable[..., tuple[int, str, str]]
BRIEF = ["--max-tokens", 8, "--temperature", 0]


@pytest.fixture
def passage(tmp_path: Path) -> Path:
    path = tmp_path / "passage.txt"
    path.write_text(document(0, 2400))
    return path


@pytest.fixture
def other_server() -> Iterator[tuple[str, list[Any]]]:
    """Someone else's server of OpenAI's API, which knows nothing of `rapid`: its URL, and what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send("application/json", json.dumps({"data": [{"id": "other"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body))
            chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in ("Ay", "e", None)]
            usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, usage]]
            self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

        def _send(self, kind: str, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()
        thread.join()


def cached(err: str) -> list[tuple[int, int]]:
    """(prompt tokens, of these cached) of each answer."""
    pairs = re.findall(r"prompt ([\d,]+), ([\d,]+) of it cached", err)
    return [(int(prompt.replace(",", "")), int(known.replace(",", ""))) for prompt, known in pairs]


@pytest.mark.parametrize("where", ["here", "with a server"])
def test_the_second_question_reads_only_what_is_new(run: Run, passage: Path, where: str, smollm_url: str) -> None:
    how = ["--url", f"{smollm_url}/v1"] if where == "with a server" else []
    code, out, err = run("chat", "-d", passage, *how, *BRIEF, stdin=b"Who is speaking?\n\nTo whom?\n")
    assert code == 0, err
    assert len(out.strip().splitlines()) >= 2
    (first, _), (second, known) = cached(err)
    assert first - 16 < known < second < first + 64


def test_what_is_wrong_is_said_and_the_chat_goes_on(run: Run, smollm_url: str, passage: Path) -> None:
    script = (
        f"/nothing\n/document absent.txt\n/strategy fast\n/save\n/document {passage}\n/strategy lookup\nWho?\n/stats\n"
    )
    code, out, err = run("chat", "--url", f"{smollm_url}/v1", *BRIEF, stdin=script.encode())
    assert code == 1  # a script must be able to tell
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: there is no /nothing; /help lists the commands",
        "error: absent.txt cannot be read: no such file or directory",
        f"error: strategy must be one of {', '.join(STRATEGIES)}, got 'fast'",
        "error: /save takes one argument; see /help",
    ]
    assert out.strip()
    assert '"strategy": "lookup"' in err


def test_a_conversation_that_outgrows_the_window_can_be_cleared(run: Run, smollm_url: str, passage: Path) -> None:
    script = (
        f"Who?\n/document {passage}\n"
        + f"/document {passage}\n" * 20
        + "Why?\n/save chat.json\n/clear\n/save empty.json\nWho?\n"
    )
    code, _, err = run("chat", "--url", f"{smollm_url}/v1", *BRIEF, stdin=script.encode())
    assert code == 1
    assert re.search(r"error: 400 .*maximum context length is 8192 tokens.*/clear forgets it all", err)
    assert [message["role"] for message in json.loads(Path("chat.json").read_text())] == ["user", "assistant"]
    assert json.loads(Path("empty.json").read_text()) == []
    assert [prompt < 64 for prompt, _ in cached(err)] == [True, True]


def test_someone_elses_server_will_do_and_gets_its_key(
    run: Run, other_server: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = other_server
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    monkeypatch.setenv("RAPID_API_KEY", "of-rapid")
    code, out, err = run("chat", "--url", url, stdin=b"Well?\nSure?\n")
    assert (code, out) == (0, "Aye\nAye\n")
    assert "2 tokens" in err
    assert [key for key, _ in seen] == ["Bearer of-rapid"] * 2
    assert [message["content"] for message in seen[1][1]["messages"]] == ["Well?", "Aye", "Sure?"]
    assert seen[0][1]["model"] == "other"
    assert "rapid" not in seen[0][1]


def test_a_server_that_is_not_there_or_not_openais_is_told_apart(run: Run, smollm_url: str) -> None:
    assert re.search("cannot be asked: .*refused", run("chat", "--url", "http://127.0.0.1:1/v1", stdin=b"Hi\n")[2])
    assert "404 from" in run("chat", "--url", f"{smollm_url}/v9", stdin=b"Hi\n")[2]
    code, _, err = run("chat", "--model", MODEL, stdin=b"Hi\n")
    assert (code, "give its --url" in err) == (2, True)


class Interrupted:
    """Writes one word, and then somebody presses Ctrl-C."""

    model, extra = "slow", {}

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.was_closed = False

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[str | dict[str, Any], None]:
        self.bodies.append(body)
        try:
            yield "Because"
            if len(self.bodies) == 1:
                signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
            yield {"usage": {"completion_tokens": 1}}
        finally:
            self.was_closed = True


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Interrupted()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nAnd then?\n"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert Chat(client, [], status=Console(stderr=True).status(""), strategy=None).run()
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert (out, "stopped" in err) == ("Because\nBecause\n", True)
    assert client.was_closed
    assert [message["content"] for message in client.bodies[1]["messages"]] == ["Why?", "Because", "And then?"]
