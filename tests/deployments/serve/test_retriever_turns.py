"""The Retriever's replica: one client's long documents stand before no other's query, and end with their client."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import builders, turns
from deployments.config import FilesConfig, RetrieverConfig
from deployments.serve.retriever import RetrieverReplica
from retrieval import Retrieval, TenantOptions
from retrieval.device import stand_behind, stands_behind

LIMIT_S = 30.0
FOUND = Retrieval((), 0, 0, 0, 0.0, reaches_threshold=True, confidence=1.0)


class Documents:
    """A retriever whose steps for the client "long", and whose vectors, do not end before ``going_on``; it counts the
    steps."""

    def __init__(self) -> None:
        self.going_on, self.begun = threading.Event(), threading.Semaphore(0)
        self.num_steps, self.embedder = 0, SimpleNamespace(passes=None, embed=self.embed)

    def embed(self, texts: Sequence[str], salt: str) -> str:
        self.begun.release()
        assert self.going_on.wait(LIMIT_S)
        return "vectors"

    def lengths(self, texts: Sequence[str]) -> bool:
        return stands_behind()

    def rerank(self, query: str, texts: Sequence[str], salt: str) -> str:
        return f"{query} {texts} {salt}"

    def steps(self, contents: Sequence[str], query: str, options: TenantOptions) -> Iterator[Retrieval | None]:
        if options.client == "long":
            for _ in range(1000):
                self.num_steps += 1
                self.begun.release()
                assert self.going_on.wait(LIMIT_S)
                yield None
        yield FOUND


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Documents]:
    documents = Documents()
    monkeypatch.setattr(builders, "build_retriever", lambda *_: documents)
    yield documents
    documents.going_on.set()


def replica() -> Any:
    return RetrieverReplica.func_or_class(RetrieverConfig(), FilesConfig(), "a model")


async def retrieve(where: Any, client: str) -> Any:
    return await answer_of(where.retrieve([], "", TenantOptions(client=client)))


async def compute(where: Any, client: str, method: str, *args: Any) -> Any:
    return await answer_of(where.compute(client, method, *args))


async def answer_of(words: AsyncGenerator[Any, None]) -> Any:
    async with aclosing(words):
        async for word in words:
            if word is not None:
                return word
    raise AssertionError("no answer")


def test_long_documents_of_one_client_stand_before_no_other_query(documents: Documents) -> None:
    async def main() -> None:
        where = replica()
        long = [asyncio.create_task(retrieve(where, "long")) for _ in range(8)]
        for _ in range(2):
            assert await asyncio.to_thread(documents.begun.acquire, timeout=LIMIT_S)
        assert await asyncio.wait_for(retrieve(where, "short"), LIMIT_S) == FOUND
        assert documents.num_steps == 2  # of eight documents
        for task in long:
            task.cancel()
        documents.going_on.set()
        await asyncio.gather(*long, return_exceptions=True)

    asyncio.run(main())


def test_a_retrieval_ends_behind_the_step_in_which_its_client_leaves(documents: Documents) -> None:
    async def main() -> None:
        where = replica()
        leaving = asyncio.create_task(retrieve(where, "long"))
        assert await asyncio.to_thread(documents.begun.acquire, timeout=LIMIT_S)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        documents.going_on.set()
        # Its turn comes when the step under way has ended.
        await asyncio.wait_for(retrieve(where, "short"), LIMIT_S)
        await asyncio.to_thread(where._queries._threads.shutdown)
        assert documents.num_steps == 1

    asyncio.run(main())


def test_a_query_computes_while_documents_do_not_get_to_it(documents: Documents) -> None:
    """Beside engines the pass of documents under way may stand still, that of a client with many even for long."""
    passes = replica()._retriever.embedder.passes

    async def main() -> None:
        behind = ThreadPoolExecutor(1, initializer=stand_behind)

        def computing() -> bool:
            documents.begun.release()
            return documents.going_on.wait(LIMIT_S) and stands_behind()

        of_many = behind.submit(passes.run, computing, is_query=False)
        of_few = asyncio.create_task(asyncio.to_thread(passes.run, computing, is_query=False))
        for _ in range(2):
            assert await asyncio.to_thread(documents.begun.acquire, timeout=LIMIT_S)
        async with asyncio.timeout(LIMIT_S / 6):
            assert not await asyncio.to_thread(passes.run, stands_behind, is_query=True)
        assert not of_few.done() and not of_many.done()
        documents.going_on.set()
        assert not await of_few
        assert of_many.result(LIMIT_S) == (sys.platform == "linux")

    asyncio.run(main())


def test_texts_of_one_client_stand_before_no_other_s(documents: Documents) -> None:
    async def main() -> None:
        where = replica()
        many = [asyncio.create_task(compute(where, "many", "embed", ["text"], "salt")) for _ in range(64)]
        assert await asyncio.to_thread(documents.begun.acquire, timeout=LIMIT_S)
        async with asyncio.timeout(LIMIT_S / 6):
            assert await compute(where, "few", "rerank", "query", ["text"], "salt") == "query ['text'] salt"
        documents.going_on.set()
        assert await asyncio.gather(*many) == ["vectors"] * 64

    asyncio.run(main())


def test_texts_of_a_client_with_many_stand_behind_the_engines(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        where = replica()
        assert not await compute(where, "one", "lengths", ["text"])
        monkeypatch.setattr(turns, "_MUCH_S", -1.0)
        assert await compute(where, "one", "lengths", ["text"]) == (sys.platform == "linux")

    asyncio.run(main())
