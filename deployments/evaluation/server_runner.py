"""Asks a server that speaks OpenAI's API: this project's by every strategy, another one as it answers by itself."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from deployments.evaluation.config import Row, System
from deployments.evaluation.runner import Ask, Origins, Passage, Reply, decoding, has_read
from deployments.openai_client import UNREACHABLE, OpenAIServer, text_of
from rapid.errors import RapidError


class ServerRunner:
    """A runner of the server of ``system``.

    Raises:
        RapidError: the server cannot be asked which model it has.
    """

    def __init__(self, system: System) -> None:
        assert system.url is not None
        self._url, self._server = system.url, OpenAIServer(system.url)
        known = self._known() if system.model else [self._server.first_model()]
        self.is_rapid = any(model.get("owned_by") == "rapid" for model in known)
        self._model = system.model or str(known[0]["id"])

    def _known(self) -> list[dict[str, Any]]:
        """The models that the server names. Some name none, or fail to, and yet have the one that is asked for."""
        try:
            return self._server.models()
        except RapidError as error:
            if error.status == UNREACHABLE:
                raise
            return []

    def refusal(self, row: Row) -> str | None:
        if row.retrieve_from != "read":
            return f"a server retrieves from what it is sent: retrieve_from {row.retrieve_from} runs in process alone"
        if self.is_rapid or (row.strategy == "autoregressive" and set(row.options()) == {"strategy"}):
            return None
        return f"{self._url} is another project's server, which has no strategy {row.strategy}"

    def about(self) -> dict[str, Any]:
        return {"name": self._model, "url": self._url, "server": "RAPID" if self.is_rapid else "another one"}

    async def answer(self, ask: Ask) -> Reply:
        """As `Runner.answer`; ``unread`` cannot be had here, and rows with a ``source`` are refused before."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(message) for message in ask.messages],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
        }
        if self.is_rapid:
            query = {"query": ask.query} if ask.query else {}
            body["rapid"] = ask.row.options() | query | {"trace": True}
        origins, text, finish = Origins(), "", None
        last: dict[str, Any] = {}
        started = time.perf_counter()
        times: list[float] = []
        async with aclosing(self._server.stream(body)) as chunks:
            async for chunk in chunks:
                if piece := text_of(chunk):
                    times.append(time.perf_counter() - started)
                    text += piece
                last |= {name: chunk[name] for name in ("usage", "rapid") if chunk.get(name)}
                if round_ := chunk.get("rapid_round"):
                    origins.add(round_["tokens"])
                for choice in chunk["choices"]:
                    finish = choice.get("finish_reason") or finish
        total_s = time.perf_counter() - started
        usage, statistics = last.get("usage") or {}, last.get("rapid") or {}
        tokens = usage.get("completion_tokens")
        if statistics:
            decoded, decode_s = decoding(statistics)
        else:  # without the first token, which came with the reading of the prompt
            decoded, decode_s = (tokens or len(times)) - 1, (times[-1] - times[0] if times else 0.0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Reply(
            text=text,
            finish=finish,
            tokens=tokens,
            first_s=times[0] if times else total_s,
            total_s=total_s,
            decoded=max(0, decoded),
            decode_s=decode_s,
            is_clocked_here=not statistics,
            has_read=None if cached is None else has_read(cached, usage["prompt_tokens"]),
            pieces=origins.pieces,
            origins=origins.counts,
            statistics=statistics,
            passages=[
                Passage(int(chunk["start"]), int(chunk["end"]), chunk["score"], "")
                for chunk in statistics.get("chunks", ())
            ],
        )
