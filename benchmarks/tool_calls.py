"""Random tool sets, asked of the embedded model, whose chat template has no place for tools: how many calls are whole.

A call is whole if it names a tool of the request and its arguments are JSON that the tool's schema allows, by
jsonschema, which is not the library that masks tokens. Every request draws its strategy, and whether it forces a call,
one tool's call, or leaves the model the choice; then there may be no call, but no half of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

from benchmarks.common.results import write
from benchmarks.structured import AT_ONCE, MODEL, NAMES, WORDS, schema, valid
from deployments.builders import local_backend
from deployments.config import PUBLIC, parse_config
from deployments.http.responses import ResponseFormatter
from deployments.schemas.chat import ChatRequest
from deployments.service import LocalService
from rapid.text.tokenizer import load_tokenizer

STRATEGIES = ("autoregressive", "lookup", "rapid")


def requests(num: int) -> Iterator[ChatRequest]:
    """Each with one to four tools; every other one greedy."""
    for i in range(num):
        chance = random.Random(i)
        names = [f"{verb}_{noun}" for verb in ("get", "set", "find") for noun in chance.sample(NAMES, 2)]
        functions = [
            {"name": name, "parameters": schema(chance), "strict": chance.random() < 0.5}
            for name in chance.sample(names, chance.randrange(1, 5))
        ]
        tools = [{"type": "function", "function": function} for function in functions]
        named = {"type": "function", "function": {"name": functions[0]["name"]}}
        strategy = chance.choice(STRATEGIES)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Use a function for the {chance.choice(WORDS)}. Then say why."}],
            "tools": tools,
            "tool_choice": chance.choice(("required", named, "auto")),
            "max_tokens": 512,
            "temperature": 0 if i % 2 else 1,
            "seed": i,
            "rapid": {"strategy": strategy, **({} if strategy == "autoregressive" else {"num_draft_tokens": 4})},
        }
        yield ChatRequest.model_validate_json(json.dumps(body))


async def answer(service: LocalService, request: ChatRequest) -> dict[str, Any]:
    """The choice as a client would get it."""
    formatter = ResponseFormatter(request)
    whole = formatter.whole([event async for event in service.generate(request, PUBLIC)])
    return dict(whole["choices"][0])


def faults(choice: dict[str, Any], request: ChatRequest) -> list[str]:
    """What is wrong with the calls of an answer."""
    schemas = {tool.function.name: tool.function.parameters for tool in request.tools}
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    wrong = [
        f"no such call: {call}"
        for call in calls
        if not valid(call["arguments"], schemas.get(call["name"], {"not": {}}))
    ]
    if request.tool_choice != "auto" and (len(calls) != 1 or choice["finish_reason"] != "tool_calls"):
        wrong.append(f"{len(calls)} forced calls, ended with {choice['finish_reason']}")
    if "<tool_call>" in (choice["message"]["content"] or "") and choice["finish_reason"] != "length":
        wrong.append("half a call in the text")
    return wrong


async def run(num: int) -> list[dict[str, Any]]:
    settings = parse_config({"target": {"model": MODEL}, "colocated": True})
    rows: list[dict[str, Any]] = []
    places = asyncio.Semaphore(AT_ONCE)
    with local_backend(settings) as backend:
        service = LocalService(settings, backend, load_tokenizer(MODEL))

        async def one(request: ChatRequest) -> None:
            async with places:
                choice = await answer(service, request)
            wrong = faults(choice, request)
            choice_of_tool = request.tool_choice if isinstance(request.tool_choice, str) else "named"
            rows.append(
                {
                    "seed": request.seed,
                    "tool_choice": choice_of_tool,
                    "strategy": request.rapid.strategy,
                    "calls": len(choice["message"].get("tool_calls", [])),
                    "ended": choice["finish_reason"],
                    "faults": wrong,
                }
            )
            if wrong:
                print(f"  {rows[-1]}: {choice['message']}", flush=True)
            if len(rows) % 20 == 0:
                print(f"  {len(rows)} of {num}, {sum(not row['faults'] for row in rows)} whole", flush=True)

        await asyncio.gather(*(one(request) for request in requests(num)))
    return sorted(rows, key=lambda row: row["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=200)
    options = parser.parse_args()
    rows = asyncio.run(run(options.num))
    whole, calls = sum(not row["faults"] for row in rows), sum(row["calls"] for row in rows)
    print(f"{whole} of {options.num} whole, {calls} calls")
    write("tool_calls", {"num": options.num, "whole": whole, "calls": calls, "rows": rows})
    if whole < options.num:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
