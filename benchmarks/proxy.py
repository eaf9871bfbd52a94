"""Streams of all APIs through a proxy that gives up after 15 s of silence, while a prompt is read for 30 s and more.

The server is `rapid serve` with the embedded model on one thread, its window widened (YaRN) to hold the prompts: parts
of a novel, each read for the first time. A stream must end as it should, with the proxy never out of patience.
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import argparse
import asyncio
import time
from typing import Any

import httpx

from benchmarks.common.local import with_window
from benchmarks.common.proxy import Proxy
from benchmarks.common.results import DATA, write
from benchmarks.common.served import served
from benchmarks.documented_examples.examples import events_of
from benchmarks.documented_examples.shapes import joined

SILENCE_S, PREFILL_S, REQUEST_S = 15.0, 30.0, 200.0
CHARACTERS_PER_TOKEN = 4  # of a novel, about
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def body(path: str, text: str, model: str) -> dict[str, Any]:
    """A stream of a few tokens about ``text``, which the target reads whole."""
    chat = {"messages": [{"role": "user", "content": f"{text}\n\nWho is speaking?"}], "max_tokens": 8}
    asked = {
        "/v1/completions": {"prompt": text, "max_tokens": 8},
        "/v1/responses": {"input": f"{text}\n\nWho is speaking?", "max_output_tokens": 8},
    }
    return {"model": model, "stream": True, "rapid": {"strategy": "autoregressive"}, **asked.get(path, chat)}


async def streamed(url: str, path: str, text: str) -> dict[str, Any]:
    """What a client behind the proxy got."""
    proxy = Proxy(httpx.URL(url).port or 80, SILENCE_S)
    async with proxy.listening() as port, httpx.AsyncClient(timeout=REQUEST_S) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        began = time.monotonic()
        try:
            answer = await client.post(f"http://127.0.0.1:{port}{path}", json=body(path, text, model))
            sent = answer.raise_for_status().text
        except httpx.HTTPError as error:
            return {"path": path, "is_complete": False, "error": repr(error), "given_up": proxy.given_up}
    events = events_of(sent)
    kind, data = events[-1]
    told = joined(path, events)["rapid"]
    return {
        "path": path,
        "is_complete": data == "[DONE]" or kind in ("response.completed", "response.incomplete", "message_stop"),
        "prompt_tokens": told["prompt_tokens"],
        "cached_tokens": told["cached_tokens"],
        "prefill_s": round(told["timings_ms"]["target_prefill"] / 1e3, 1),
        "seconds": round(time.monotonic() - began, 1),
        "longest_silence_s": round(proxy.longest_s, 2),
        "given_up": proxy.given_up,
    }


async def run(url: str, num_tokens: int) -> list[dict[str, Any]]:
    novel, length = (DATA / "moby-dick.txt").read_text(encoding="utf-8"), num_tokens * CHARACTERS_PER_TOKEN
    rows = []
    for i, path in enumerate(PATHS):
        rows.append(await streamed(url, path, novel[30_000 + i * length :][:length]))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8_500, help="of each prompt, about")
    options = parser.parse_args()
    with with_window(options.tokens * 3 // 2) as model, served(target={"model": model, "threads": 1}) as url:
        rows = asyncio.run(run(url, options.tokens))
    write("proxy", {"silence_limit_s": SILENCE_S, "streams": rows})
    if not all(row["is_complete"] and not row["given_up"] for row in rows):
        raise SystemExit("not every stream was complete; see above")
    if any(row["prefill_s"] < PREFILL_S for row in rows):
        raise SystemExit(f"a prefill took less than {PREFILL_S} s: give more --tokens")


if __name__ == "__main__":
    main()
