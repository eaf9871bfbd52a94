"""Uploads a file of 120K tokens to the embedded default while other requests run, and measures the effect on them.

A plain stream is read alone and during an upload. Then questions about the file are asked: it is longer than the
model's window, so only `rag` can answer. Short chats begin during a second upload, which is deleted midway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.common.clients import MODEL, new_client
from benchmarks.common.results import DATA, write
from benchmarks.common.served import served
from benchmarks.load import percentiles
from rapid.text.tokenizer import load_tokenizer

QUESTION = "Why does the narrator go to sea?"
STREAM_TOKENS = 1_000  # of one stream; another follows
PROBES = 5


def texts(num_tokens: int) -> list[str]:
    """The beginnings of two novels, of this many tokens each."""
    found = []
    for name in ("moby-dick.txt", "pride-and-prejudice.txt"):
        novel = (DATA / name).read_text(encoding="utf-8")
        offsets = load_tokenizer(MODEL)(novel, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(offsets) < num_tokens:
            raise SystemExit(f"{name} has only {len(offsets)} tokens")
        found.append(novel[: offsets[num_tokens - 1][1]])
    return found


async def pieces(http: httpx.AsyncClient, url: str, content: Any, **more: Any) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed greedy answer that contain text, and the chunk with the `rapid` object."""
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "stream": True, **more}
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise SystemExit((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "rapid" in chunk or any(choice["delta"].get("content") for choice in chunk["choices"]):
                    yield chunk


async def gaps(http: httpx.AsyncClient, url: str, goes_on: Callable[[], bool]) -> list[float]:
    """The seconds between the tokens of plain streams, one stream after another, until ``goes_on`` returns False."""
    seen: list[float] = []
    plain = {"max_tokens": STREAM_TOKENS, "ignore_eos": True, "rapid": {"strategy": "autoregressive"}}
    while goes_on():
        last = None
        stream = pieces(http, url, "Tell a long story about the sea.", **plain)
        async for _ in stream:
            now = time.perf_counter()
            if last is not None:
                seen.append(now - last)
            last = now
            if not goes_on():
                break
        await stream.aclose()  # type: ignore[attr-defined]
    return seen


async def first_token(http: httpx.AsyncClient, url: str, content: Any, **more: Any) -> tuple[float, str, Any]:
    """(seconds to the first token, the answer, its `rapid` object)."""
    started, first_s, text, rapid = time.perf_counter(), 0.0, "", None
    async for chunk in pieces(http, url, content, max_tokens=24, **more):
        first_s = first_s or time.perf_counter() - started
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        rapid = chunk.get("rapid", rapid)
    return first_s, text, rapid


@asynccontextmanager
async def uploaded(http: httpx.AsyncClient, url: str, text: str) -> AsyncIterator[dict[str, Any]]:
    """The file's object, once the service has accepted it; the file is deleted afterwards."""
    form = {"files": {"file": ("book.txt", text.encode())}, "data": {"purpose": "user_data"}}
    file = (await http.post(f"{url}/v1/files", **form)).raise_for_status().json()
    try:
        yield file
    finally:
        (await http.delete(f"{url}/v1/files/{file['id']}")).raise_for_status()


async def processed(http: httpx.AsyncClient, url: str, file_id: str) -> dict[str, Any]:
    while (file := (await http.get(f"{url}/v1/files/{file_id}")).raise_for_status().json())["status"] == "processing":
        await asyncio.sleep(0.25)
    if file["status"] != "processed":
        raise SystemExit(f"the file was not embedded: {file['status_details']}")
    found: dict[str, Any] = file
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    found = {name: round(s * 1e3, 1) for name, s in (percentiles(seconds) or {}).items()}
    return {"count": len(seconds), **found, "worst": round(max(seconds) * 1e3, 1)}


async def measure(url: str, num_tokens: int, alone_s: float) -> dict[str, Any]:
    book, other = texts(num_tokens)
    results: dict[str, Any] = {}
    async with new_client() as http:
        await first_token(http, url, "Name a colour.")
        until = time.perf_counter() + alone_s
        results["gaps_ms_alone"] = spread(await gaps(http, url, lambda: time.perf_counter() < until))
        probes = [(await first_token(http, url, f"Name {n} colours."))[0] for n in range(PROBES)]
        results["short_first_s_alone"] = round(statistics.median(probes), 3)

        is_done = False
        reading = asyncio.create_task(gaps(http, url, lambda: not is_done))
        await asyncio.sleep(1)  # the stream runs
        started = time.perf_counter()
        async with uploaded(http, url, book) as file:
            results["accepted_s"] = round(time.perf_counter() - started, 2)
            file = await processed(http, url, file["id"])
            results["processed_s"] = round(time.perf_counter() - started, 1)
            is_done = True
            results["gaps_ms_during"] = spread(await reading)
            results["file"] = {"bytes": file["bytes"], **file["rapid"]}
            part = [{"type": "file", "file": {"file_id": file["id"]}}, {"type": "text", "text": QUESTION}]
            asked = [await first_token(http, url, part, rapid={"strategy": "rag"}) for _ in range(2)]
            (first_s, text, rapid), (again_s, _, _) = asked
            told = {name: rapid[name] for name in ("context_tokens", "retrieved_tokens", "fallback")}
            results["rag"] = {"first_s": round(first_s, 2), "again_s": round(again_s, 2), "answer": text, **told}

        async with uploaded(http, url, other) as file:
            probes = [(await first_token(http, url, f"Name {n} oceans."))[0] for n in range(PROBES)]
            state = (await http.get(f"{url}/v1/files/{file['id']}")).raise_for_status().json()
            assert state["status"] == "processing", "the file was embedded before the chats had begun"
            results["short_first_s_during"] = [round(s, 3) for s in probes]
            started = time.perf_counter()
        results["deleted_midway_s"] = round(time.perf_counter() - started, 2)
    return results


def show(results: dict[str, Any]) -> None:
    alone, during, rag = (results[name] for name in ("gaps_ms_alone", "gaps_ms_during", "rag"))
    table = Table("", "alone", f"during an upload of {results['file']['tokens']:,} tokens")
    for name in ("p50", "p95", "worst"):
        table.add_row(f"ms between tokens, {name}", f"{alone[name]}", f"{during[name]}")
    probes = results["short_first_s_during"]
    worst = f"{statistics.median(probes)} (worst {max(probes)})"
    table.add_row("s to a short chat's first token", f"{results['short_first_s_alone']}", worst)
    table.add_row("s until accepted, processed", "", f"{results['accepted_s']}, {results['processed_s']}")
    table.add_row("s to the first token of `rag`, again", f"{rag['first_s']}, {rag['again_s']}", "")
    table.add_row("s to delete one midway", f"{results['deleted_midway_s']}", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=120_000, help="of each file")
    parser.add_argument("--alone-s", type=float, default=15, help="for how long the stream is read alone")
    options = parser.parse_args()
    with served() as url:
        results = asyncio.run(measure(url, options.tokens, options.alone_s))
    show(results)
    write("files", results)


if __name__ == "__main__":
    main()
