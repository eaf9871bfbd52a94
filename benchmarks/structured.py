"""Random JSON schemas, answered by the embedded model while a drafter drafts: how many answers are valid.

Schemas are bounded (strings, arrays, digits), so that an answer ends before its max_tokens: otherwise a small model
would fill a string until then. jsonschema checks validity; it is not the library that masks tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema

from benchmarks.common.results import DATA, write
from deployments.builders import local_backend
from deployments.config import PUBLIC, parse_config
from deployments.schemas.chat import ChatRequest
from deployments.service import LocalService
from rapid.events import Delta, Finish, Statistics
from rapid.text.tokenizer import load_tokenizer

MODEL = "smollm2-135m-instruct"
NAMES = ("name", "age", "place", "mood", "tags", "ship", "count", "day", "is_old", "captain", "weather", "items")
WORDS = ("sea", "whale", "harpoon", "captain", "storm", "harbour", "crew", "anchor")
AT_ONCE = 8


def leaf(chance: random.Random) -> dict[str, Any]:
    low = chance.randrange(0, 50)
    return chance.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + chance.randrange(1, 1000)},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "minLength": chance.randrange(0, 4), "maxLength": chance.randrange(4, 24)},
            {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
            {"type": "string", "pattern": "^20[0-9]{2}-0[1-9]-[12][0-9]$"},
            {"enum": chance.sample(WORDS, 3)},
            {"const": chance.choice(WORDS)},
            {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"enum": chance.sample(WORDS, 2)}]},
        ]
    )


def schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """An object of one to four properties, nested up to three deep; some of them are optional."""
    properties: dict[str, Any] = {}
    for name in chance.sample(NAMES, chance.randrange(1, 5)):
        kind = chance.random()
        if kind < 0.15 and depth < 2:
            properties[name] = schema(chance, depth + 1)
        elif kind < 0.35:
            fewest = chance.randrange(0, 2)
            items = leaf(chance)
            properties[name] = {"type": "array", "items": items, "minItems": fewest, "maxItems": fewest + 2}
        else:
            properties[name] = leaf(chance)
    required = [name for name in properties if chance.random() < 0.8]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def requests(num: int, strategy: str) -> Iterator[ChatRequest]:
    """Every other one greedy; a passage of a novel with a question about it, and a schema."""
    novel = (DATA / "moby-dick.txt").read_text(encoding="utf-8")
    for i in range(num):
        chance = random.Random(i)
        start = chance.randrange(30_000, 900_000)
        wanted = schema(chance)
        question = f"Describe a {chance.choice(WORDS)} of this passage as JSON: {', '.join(wanted['properties'])}."
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{novel[start : start + 700]}\n\n{question}"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}},
            "max_tokens": 512,
            "temperature": 0 if i % 2 else 1,
            "seed": i,
            "rapid": {"strategy": strategy, **({} if strategy == "autoregressive" else {"num_draft_tokens": 4})},
        }
        yield ChatRequest.model_validate_json(json.dumps(body))


async def answer(service: LocalService, request: ChatRequest) -> tuple[str, str, Statistics]:
    """(text, the reason of its end, its statistics)."""
    text = ""
    async for event in service.generate(request, PUBLIC):
        text += event.text if isinstance(event, Delta | Finish) else ""
        if isinstance(event, Finish):
            return text, event.reason, event.statistics
    raise AssertionError("a completion ends with Finish")


async def run(num: int, strategy: str) -> list[dict[str, Any]]:
    retriever = {"long_content_tokens": 100, "options": {"chunk_tokens": 64, "min_tokens": 96, "threshold": -1}}
    settings = parse_config({"target": {"model": MODEL}, "colocated": True, "retriever": retriever})
    rows: list[dict[str, Any]] = []
    places = asyncio.Semaphore(AT_ONCE)
    with local_backend(settings) as backend:
        service = LocalService(settings, backend, load_tokenizer(MODEL))

        async def one(request: ChatRequest) -> None:
            async with places:
                text, reason, statistics = await answer(service, request)
            assert request.response_format is not None and request.response_format.type == "json_schema"
            wanted = request.response_format.json_schema.json_schema
            numbers = {name: getattr(statistics, name) for name in ("emitted", "drafted", "accepted", "fallback")}
            rows.append({"seed": request.seed, "valid": valid(text, wanted), "ended": reason, **numbers, "text": text})
            if not rows[-1]["valid"]:
                print(f"  not valid: {rows[-1]}, {wanted}", flush=True)
            if len(rows) % 20 == 0:
                print(f"  {len(rows)} of {num}, {sum(row['valid'] for row in rows)} valid", flush=True)

        await asyncio.gather(*(one(request) for request in requests(num, strategy)))
    return sorted(rows, key=lambda row: row["seed"])


def valid(text: str, wanted: dict[str, Any]) -> bool:
    """Whether ``text`` is JSON that the schema ``wanted`` allows."""
    try:
        jsonschema.validate(json.loads(text), wanted, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--strategy", default="rapid")
    options = parser.parse_args()
    rows = asyncio.run(run(options.num, options.strategy))
    totals = {name: sum(row[name] for row in rows) for name in ("valid", "emitted", "drafted", "accepted")}
    print(
        f"{totals['valid']} of {options.num} valid; {totals['accepted']} of {totals['drafted']} draft tokens accepted"
    )
    write("structured", {"strategy": options.strategy, "num": options.num, **totals, "rows": rows})
    if totals["valid"] < options.num:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
