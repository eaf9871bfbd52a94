"""`rapid chat`: a conversation about documents, with models in this process or a server that speaks OpenAI's API."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from deployments.cli.chat_clients import ChatClient, LocalChatClient, RemoteChatClient
from deployments.cli.inputs import read_document
from deployments.config import AppConfig
from rapid.errors import InvalidRequest, RapidError
from rapid.strategies import STRATEGIES

PROMPT = "\001\033[1;36m\002›\001\033[0m\002 "  # \001 and \002 tell readline what takes no room
COMMANDS = {
    "/document FILE": "add a text to what the next question is about",
    "/strategy NAME": f"decode by {', '.join(STRATEGIES)}",
    "/stats": "how the last answer came about",
    "/clear": "forget the conversation and its documents",
    "/save FILE": "write the conversation as JSON that the API takes",
    "/quit": "leave; so does Ctrl-D",
}


def chat_here(config: AppConfig, documents: list[str], **how: Any) -> bool:
    """A conversation with the models of ``config``, loaded into this process; ``how`` is `Chat`'s."""
    from transformers.utils.logging import disable_progress_bar

    from deployments.builders import local_backend
    from deployments.service import LocalService
    from rapid.text.tokenizer import load_tokenizer

    disable_progress_bar()
    status = Console(stderr=True).status("loading the models")

    def on_prefill(role: str, done: int, total: int) -> None:
        status.update(f"{role} reads: {done:,} of {total:,} tokens")

    with status, local_backend(config, on_prefill=on_prefill) as backend:
        service = LocalService(config, backend, load_tokenizer(config.target.model))
        status.stop()
        return Chat(LocalChatClient(config.model_name, service), documents, status=status, **how).run()


def chat_with(url: str, model: str | None, documents: list[str], **how: Any) -> bool:
    """A conversation with a server, and the first of its models unless one is named."""
    return Chat(RemoteChatClient(url, model), documents, status=Console(stderr=True).status(""), **how).run()


class Chat:
    """The conversation and its commands. Answers go to stdout, all else to stderr."""

    def __init__(
        self, client: ChatClient, documents: list[str], *, status: Status, strategy: str | None, **options: Any
    ) -> None:
        self._client, self._options, self._status = client, options, status
        self._messages: list[dict[str, str]] = []
        self._documents = documents
        self._num_shown = 0  # how many of the documents are in the messages
        self._strategy: str | None = None
        self._last: dict[str, Any] = {}
        self._stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        if strategy:
            self._use(strategy)

    def run(self) -> bool:
        """Until the end of the input; whether everything that was asked could be answered."""
        is_typed = sys.stdin.isatty()
        if is_typed:
            import readline  # noqa: F401  # gives `input` a history, which is never written anywhere

            self._say(f"[bold]{self._client.model}[/bold] · /help lists the commands, Ctrl-C stops an answer")
        went_well = True
        with asyncio.Runner() as runner:
            while True:
                try:
                    line = input(PROMPT if is_typed else "").strip()
                except EOFError:
                    break
                except KeyboardInterrupt:
                    self._say("\n[dim]Ctrl-D leaves[/dim]")
                    continue
                if line in ("/quit", "/exit"):
                    return went_well
                try:
                    if line.startswith("/"):
                        self._command(*line.split(maxsplit=1))
                    elif line:
                        self._ask(runner, line)
                except RapidError as error:
                    went_well = False
                    hint = " /clear forgets it all." if error.code == "context_length_exceeded" else ""
                    self._say(f"[red]error:[/red] {escape(error.message)}{hint}")
        if is_typed:
            print()
        return went_well

    def _ask(self, runner: asyncio.Runner, question: str) -> None:
        content = "\n\n".join([*self._documents[self._num_shown :], question])
        messages = [*self._messages, {"role": "user", "content": content}]
        body = {"model": self._client.model, "messages": messages, **self._client.extra}
        body |= {name: value for name, value in self._options.items() if value is not None}
        if self._strategy:
            body["rapid"] = body.get("rapid", {}) | {"strategy": self._strategy}
        pieces: list[str] = []
        try:
            runner.run(self._show(body, pieces))
        except KeyboardInterrupt:
            print()
            self._say("[dim]stopped[/dim]")
        if pieces:
            self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
            self._num_shown = len(self._documents)

    async def _show(self, body: dict[str, Any], pieces: list[str]) -> None:
        """Streams one answer to stdout and into ``pieces``; then one line about it."""
        self._status.update("waiting for the first word")
        times = [time.perf_counter()]
        self._last = {}
        with self._status:
            async with aclosing(self._client.answer(body)) as events:
                async for event in events:
                    if isinstance(event, dict):
                        self._last = event
                    elif event:
                        self._status.stop()
                        times.append(time.perf_counter())
                        pieces.append(event)
                        print(event, end="", flush=True)
        print("" if pieces and pieces[-1].endswith("\n") else "\n", end="", flush=True)
        self._say(f"[dim]{_summary(self._last, times)}[/dim]")

    def _command(self, name: str, argument: str = "") -> None:
        commands: dict[str, Callable[..., None]] = {
            "/document": self._add,
            "/strategy": self._use,
            "/stats": self._tell,
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
        }
        if name not in commands:
            raise InvalidRequest(f"there is no {name}; /help lists the commands")
        takes_one = any(usage.startswith(f"{name} ") for usage in COMMANDS)
        if takes_one != bool(argument):
            raise InvalidRequest(f"{name} takes {'one argument' if takes_one else 'no argument'}; see /help")
        commands[name](*[argument] * takes_one)

    def _add(self, path: str) -> None:
        self._documents.append(read_document(Path(path).expanduser()))
        self._say(f"[dim]{len(self._documents[-1]):,} characters, for the next question[/dim]")

    def _use(self, strategy: str) -> None:
        if strategy not in STRATEGIES:
            raise InvalidRequest(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self._strategy = strategy

    def _tell(self) -> None:
        self._stderr.print_json(json.dumps(self._last))

    def _clear(self) -> None:
        self._messages, self._documents, self._num_shown = [], [], 0

    def _save(self, path: str) -> None:
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                json.dump(self._messages, file, ensure_ascii=False, indent=1)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error

    def _help(self) -> None:
        for usage, meaning in COMMANDS.items():
            self._say(f"  [cyan]{usage:<16}[/cyan]{meaning}")

    def _say(self, text: str) -> None:
        self._stderr.print(text)


def _summary(last: dict[str, Any], times: list[float]) -> str:
    """How an answer came about, in one line. ``times``: when it was asked for, and when each piece came."""
    usage, rapid = last.get("usage") or {}, last.get("rapid") or {}
    written, prompt = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    parts = [f"{written:,} tokens"] if written else []
    if written > 1 and times[-1] > times[1]:
        parts.append(f"{(written - 1) / (times[-1] - times[1]):.1f} tokens/s")
    if len(times) > 1:
        parts.append(f"first after {times[1] - times[0]:.1f} s")
    if rapid.get("drafted"):
        parts.append(f"{rapid['accepted']} of {rapid['drafted']} drafted accepted")
    if prompt:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        parts.append(f"prompt {prompt:,}, {cached:,} of it cached")
    return " · ".join(parts) or "no statistics"
