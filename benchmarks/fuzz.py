"""The HTTP API against schemathesis, and against thousands of malformed requests: each gets an answer, and no 5xx.

Both read /openapi.json, so a new route is attacked as soon as it is described there. Afterwards the engines may hold no
sequence. The model has random weights and writes letters: only the path to it and back is tested. A server that runs
already, on Ray, gets only the malformed requests (`--url`).
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common.malformed import Attacker, logged_errors, strike
from benchmarks.common.results import write
from deployments.builders import local_backend
from deployments.config import parse_config
from deployments.http.api import make_api
from deployments.service import LocalService
from rapid.text.tokenizer import load_tokenizer

MODEL = "letters"
LETTERS = "\n abcdefghi?"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method,allow_header_conformance"
)
# What answers a body that is wrong: schemathesis does not expect the 413 of a list that is too long by itself.
REFUSALS = ["400", "401", "404", "405", "413", "415", "429"]


def make_model(folder: Path) -> None:
    """A network of a few thousand random weights, and a tokenizer with a token for each letter."""
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)


@contextmanager
def api() -> Iterator[str]:
    """The API in this process, on a free port; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        engine = {"model": folder, "kv_memory_gib": 0.1, "threads": 1}
        config = {"served_model": MODEL, "target": engine, "drafter": engine, "default_max_tokens": 8}
        settings = parse_config({**config, "files": {"folder": f"{folder}/files"}})
        with local_backend(settings) as backend, socket.create_server(("127.0.0.1", 0)) as listener:
            service = LocalService(settings, backend, load_tokenizer(folder))
            server = uvicorn.Server(uvicorn.Config(make_api(settings, service), log_level="error", lifespan="off"))
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()


def schemathesis(url: str, examples: int, seed: int) -> dict[str, Any]:
    """A run of schemathesis: the number of requests, and its failures. No schema has the model's name, so it is set."""
    description = httpx.get(f"{url}/openapi.json").json()
    for schema in _request_schemas(description):
        if "model" in schema.get("properties", {}):
            absent = [] if "model" in schema.get("required", ()) else [None]
            schema["properties"]["model"] = {"enum": [MODEL, *absent]}
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "openapi.json"
        told.write_text(json.dumps(description))
        options = f"--url {url} --checks {CHECKS} --seed {seed} --max-examples {examples} --request-timeout 30"
        report, settings = Path(folder) / "report.json", Path(folder) / "schemathesis.toml"
        settings.write_text(f"[checks.negative_data_rejection]\nexpected-statuses = {json.dumps(REFUSALS)}\n")
        run = f"run {told} --no-shrink --continue-on-failure --report-json-path {report} {options}"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), *run.split()]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if not report.exists():
            raise SystemExit(f"schemathesis did not run:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
        cases = json.loads(report.read_text())["test_cases"]
    if ran.returncode:
        print(ran.stdout)
    failed = cases["with_failures"] + cases["errored"] + cases["without_checks"]
    counts = {"requests": cases["generated"], "passed": cases["generated"] - failed}
    return {"operations": sorted(description["paths"]), **counts, "exit": ran.returncode}


def _request_schemas(description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in description["paths"].values():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield content["schema"]


def malformed(url: str, count: int, seed: int) -> dict[str, Any]:
    """Sends ``count`` malformed requests: the statuses of the answers, and the problems."""
    attacker = Attacker(httpx.get(f"{url}/openapi.json").json(), model_of(url), seed)
    attacks = track(attacker.attacks(count), "malformed requests", total=count)
    started = time.perf_counter()
    with logged_errors() as logged:
        outcome = asyncio.run(strike(url, attacks))
    for problem in [*outcome.problems, *logged][:20]:
        print(f"  {problem}")
    return {
        "requests": count,
        "seconds": round(time.perf_counter() - started, 1),
        "statuses": {kind: dict(sorted(statuses.items())) for kind, statuses in outcome.statuses.items()},
        "unhandled": len(outcome.problems) + len(logged),
        "problems": outcome.problems[:20] + logged[:20],
    }


def model_of(url: str) -> str:
    """The name of the served model."""
    name: str = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
    return name


def answer(url: str) -> str:
    """The answer to a valid request."""
    body = {"model": model_of(url), "prompt": "abc ", "max_tokens": 16, "temperature": 0}
    text: str = httpx.post(f"{url}/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
    return text


def held(url: str) -> dict[str, Any]:
    """The sequences and bytes of KV memory that are still held ten seconds after the last request."""
    deadline = time.monotonic() + 10
    while True:
        health = httpx.get(f"{url}/health").json()
        state = {"sequences": sum(health["sequences"].values()), "kv_bytes": sum(health["kv_bytes"].values())}
        if not any(state.values()) or time.monotonic() > deadline:
            return state
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=500, help="of schemathesis, for each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", help="a running server, which gets the malformed requests and no schemathesis")
    options = parser.parse_args()
    with nullcontext(options.url) if options.url else api() as url:
        before = answer(url)
        results: dict[str, Any] = {"malformed": malformed(url, options.bodies, options.seed)}
        if not options.url:
            results["schemathesis"] = schemathesis(url, options.examples, options.seed)
        results |= {"held_afterwards": held(url), "answers_as_before": answer(url) == before}
    found, failed = results["malformed"], results.get("schemathesis", {"exit": 0})
    print(f"{found['unhandled']} of {found['requests']} unhandled", failed, results["held_afterwards"])
    write("fuzz", results, part="served" if options.url else "")
    if found["unhandled"] or failed["exit"] or any(results["held_afterwards"].values()):
        raise SystemExit("something was not handled; see above")


if __name__ == "__main__":
    main()
