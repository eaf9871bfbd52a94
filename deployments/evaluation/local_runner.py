"""Asks models in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from deployments.builders import local_backend
from deployments.config import AppConfig
from deployments.datastores import Datastores
from deployments.evaluation.config import Row, System
from deployments.evaluation.runner import Ask, Origins, Passage, Reply, decoding, has_read
from deployments.evaluation.weaker import weaker_copy
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import rapid_object, round_object
from rapid.backend.local import LocalBackend
from rapid.datastore.search import Datastore
from rapid.events import Delta, Finish
from rapid.generate import generate
from rapid.request import GenerationRequest
from rapid.strategies import STRATEGIES
from rapid.text.tokenizer import load_tokenizer
from retrieval import TenantOptions


class LocalRunner:
    """A runner of the models that ``backend`` has.

    A document's vectors are kept for its other questions; a prompt that is to be unread gets a cache of its own.
    """

    def __init__(self, config: AppConfig, backend: LocalBackend, datastore: Datastore | None, name: str) -> None:
        self._config, self._backend, self._datastore, self._name = config, backend, datastore, name
        self._tokenizer = load_tokenizer(config.target.model)
        self._unread = 0

    @classmethod
    @contextmanager
    def open(cls, system: System) -> Iterator[LocalRunner]:
        """Loads the models of ``system``; leaving it frees them."""
        config = system.args
        name = config.target.model
        if system.target_bits is not None:
            folder = weaker_copy(config.target.model, system.target_bits)
            target = config.target.model_copy(update={"model": str(folder)})
            config = config.model_copy(update={"target": target})
            name = f"{name}, weights rounded to {system.target_bits} bits a row"
        datastore = Datastores(config, load_tokenizer(config.target.model)).of("")
        with local_backend(config) as backend:
            yield cls(config, backend, datastore, name)

    def refusal(self, row: Row) -> str | None:
        if row.strategy == "rest" and self._datastore is None:
            return "no datastore is configured: build one with `rapid datastore build`, and name it in datastore.path"
        return None

    def about(self) -> dict[str, Any]:
        roles = {role: asdict(self._backend.info(role)) for role in ("target", "drafter")}
        roles["target"]["name"] = self._name  # and not the folder of a weaker copy
        kept = ("name", "dtype", "quantization", "device", "window")
        models = {role: {name: info[name] for name in kept} for role, info in roles.items()}
        return models | {"retriever": self._config.retriever.embedder}

    async def answer(self, ask: Ask) -> Reply:
        request = self._request(ask)
        origins, text, started = Origins(), "", time.perf_counter()
        first_s = None
        async for event in generate(request, self._backend):
            text += event.text
            if isinstance(event, Delta):
                first_s = first_s or time.perf_counter() - started
                origins.add(round_object(event, None)["tokens"])
            if isinstance(event, Finish):
                total_s = time.perf_counter() - started
                stats, finish = event.statistics, event.reason
        statistics = rapid_object(stats)
        decoded, decode_s = decoding(statistics)
        contents = request.prompt.contents
        return Reply(
            text=text,
            finish=finish,
            tokens=stats.emitted,
            first_s=first_s or total_s,
            total_s=total_s,
            decoded=decoded,
            decode_s=decode_s,
            is_clocked_here=False,
            has_read=ask.unread or has_read(stats.cached_tokens, stats.prompt_tokens),
            pieces=origins.pieces,
            origins=origins.counts,
            statistics=statistics,
            passages=[
                Passage(start, end, chunk["score"], contents[int(chunk["content"])][start:end])
                for chunk in stats.chunks
                for start, end in [(int(chunk["start"]), int(chunk["end"]))]
            ],
        )

    def _request(self, ask: Ask) -> GenerationRequest:
        body = {
            "model": self._config.model_name,
            "messages": [dict(message) for message in ask.messages],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "rapid": ask.row.options() | ({"query": ask.query} if ask.query else {}),
        }
        read = ChatRequest.model_validate(body).read(self._tokenizer, self._config, self._backend.info("target").window)
        prompt = read.prompt
        if ask.source and prompt.contents:  # chunks take the place of the first content, which is the document
            prompt = replace(prompt, contents=[ask.source])
        self._unread += ask.unread
        salt = f"unread {self._unread}" if ask.unread else ""
        options = TenantOptions(**asdict(replace(read.retrieval, keep=not ask.unread)), tenant=salt, client=salt)
        uses = any("datastore" in drafter for drafter in STRATEGIES[ask.row.strategy].drafters)
        return replace(read, prompt=prompt, retrieval=options, salt=salt, datastore=self._datastore if uses else None)
