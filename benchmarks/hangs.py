"""Processes that hang instead of dying: each is stopped in turn while eight streams run, and a pass never returns.

A stopped process (SIGSTOP) keeps its connections and answers nothing. Answers are greedy in float32, so each must equal
the undisturbed one, or end with an error that says why. The command stops and ends only processes of its own cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import ray
from ray import serve

from benchmarks.chaos import MODEL, PORT, URL, eventually, processes
from benchmarks.common.results import DATA, write
from cluster.processes import ENVIRONMENT
from deployments.app import build
from deployments.cli.serve import EDGE, SETUP
from deployments.config import parse_config
from deployments.serve.engines import engines_of

STREAM_LIMIT_S, RECOVERY_LIMIT_S, HEALTH_TIMEOUT_S = 100.0, 120.0, 15.0
BEFORE_STREAMS = ("retriever",)  # it is asked only when a request begins
CASES = ("drafter", "target", "hung pass", "retriever", "coordinator", "controller", "replica", "proxy", "rank")


@contextmanager
def service(*, targets: int, ranks: int) -> Iterator[None]:
    """The application on this machine; ready when it yields."""
    os.environ.update(ENVIRONMENT | SETUP | EDGE)
    engine = {"model": MODEL, "dtype": "float32", "kv_memory_gib": 0.25, "max_sequences": 8, "num_cpus": 0.1}
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": 0.1}
    config = {
        "target": engine | {"replicas": {"min": targets, "max": targets}, "tensor_parallel": ranks},
        "drafter": engine,
        "speculation": {"num_draft_tokens": 2},
        "retriever": {"long_content_tokens": 128, "options": options},
    }
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build(parse_config(config)), name="rapid", route_prefix="/")
        yield
    finally:
        ray.shutdown()


@dataclass
class Stream:
    """One answer as its client saw it."""

    text: str = ""
    error: str | None = None
    num_events: int = 0
    longest_silence_s: float = 0.0  # behind the first token
    resumed: int = 0
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    resuming_s: float = 0.0  # from the loss of an engine until another had read prompt and output
    resuming_prefill_s: float = 0.0  # the part of it in which that engine read

    def silence_beyond_prefill_s(self, *, from_the_start: bool) -> float:
        """The longest silence, without the second prefill where another engine took over.

        With ``from_the_start`` the wait for the first token counts too, without the first prefill.
        """
        if from_the_start and not self.resumed and not self.error:
            return max(self.longest_silence_s, self.first_token_s - self.prefill_s)
        return self.longest_silence_s - self.resuming_prefill_s

    async def read(self, client: httpx.AsyncClient, index: int, new_tokens: int) -> None:
        passage = (DATA / "moby-dick.txt").read_text(encoding="utf-8")[30_000 + 40_000 * index :][:1600]
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{passage}\n\nWho is speaking, and what does he want?"}],
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        last, asked = None, time.monotonic()
        try:
            async with client.stream("POST", f"{URL}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    self.error = f"{response.status_code}: {(await response.aread()).decode()}"
                    return
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now, data = time.monotonic(), json.loads(line[6:])
                    if "error" in data:
                        self.error = data["error"]["message"]
                        return
                    self.text += "".join(choice["delta"].get("content") or "" for choice in data["choices"])
                    if not self.text:  # the stream begins before its first token
                        continue
                    if last is None:
                        self.first_token_s = now - asked
                    else:
                        self.longest_silence_s = max(self.longest_silence_s, now - last)
                    last = now
                    self.num_events += 1
                    if "rapid" in data:
                        self.resumed = data["rapid"]["resumed"]
                        seconds = {name: ms / 1e3 for name, ms in data["rapid"]["timings_ms"].items()}
                        self.prefill_s, self.resuming_s = seconds["target_prefill"], seconds["resuming"]
                        self.resuming_prefill_s = seconds["resuming_prefill"]
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            if self.error:
                self.longest_silence_s = max(self.longest_silence_s, time.monotonic() - (last or asked))


def engine_actor(role: str) -> Any:
    """A handle of one of its engines."""
    mine = engines_of("rapid", role.title())
    return next(
        ray.get_actor(**named)
        for named in ray.util.list_named_actors(all_namespaces=True)
        if named["name"].startswith(mine)
    )


def hang_a_pass() -> None:
    """Has the thread of a target's engine sleep in the middle of an iteration, as a stuck kernel would."""

    def stuck(self: Any) -> None:
        def task() -> Any:
            time.sleep(3600)
            yield

        self._engine.submit(task())

    ray.get(engine_actor("target").__ray_call__.remote(stuck), timeout=10)


def process_of(case: str) -> int:
    """The process that the case stops."""
    if case in ("target", "drafter"):
        pid: int = ray.get(engine_actor(case).pid.remote(), timeout=10)
        return pid
    titles = {
        "retriever": "ServeReplica:rapid:Retriever",
        "coordinator": "ServeReplica:rapid:Coordinator",
        "replica": "ServeReplica:rapid:Target",
        "controller": "ServeController",
        "proxy": "ProxyActor",
        "rank": "RankActor",
    }
    return processes(titles[case])[0].pid


async def health(client: httpx.AsyncClient) -> str:
    try:
        answer = await client.get(f"{URL}/health", timeout=HEALTH_TIMEOUT_S)
    except httpx.HTTPError as error:
        return type(error).__name__
    return answer.json()["status"] if answer.status_code == 200 else str(answer.status_code)


async def truth(client: httpx.AsyncClient, began: float, until: Callable[[], bool]) -> dict[str, Any]:
    """When ``/health`` first said that something is wrong, and the longest that it took to say anything."""
    told, well_again_s, slowest = None, None, 0.0
    while not until():
        asked = time.monotonic()
        said = await health(client)
        slowest = max(slowest, time.monotonic() - asked)
        if told is None and said != "ok":
            told = (round(time.monotonic() - began, 1), said)
        elif told is not None and well_again_s is None and said == "ok":
            well_again_s = round(time.monotonic() - began, 1)
        await asyncio.sleep(0.25)
    return {
        "health_told_s": told[0] if told else None,
        "health_said": told[1] if told else None,
        "health_ok_again_s": well_again_s,
        "health_slowest_answer_s": round(slowest, 1),
    }


async def disturbed(case: str, expected: list[str], num_streams: int, new_tokens: int) -> dict[str, Any]:
    """Eight streams, one hang, and what came of them."""
    streams = [Stream() for _ in range(num_streams)]
    pid: int | None = None

    def hang() -> None:
        nonlocal pid
        if case == "hung pass":
            hang_a_pass()
            return
        pid = process_of(case)
        os.kill(pid, signal.SIGSTOP)

    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(timeout=STREAM_LIMIT_S, limits=limits) as client:
            if case in BEFORE_STREAMS:
                await asyncio.to_thread(hang)
            began = time.monotonic()
            reading = [asyncio.create_task(s.read(client, i, new_tokens)) for i, s in enumerate(streams)]
            if case not in BEFORE_STREAMS:
                while min(stream.num_events for stream in streams) < 8 and not all(r.done() for r in reading):
                    await asyncio.sleep(0.05)
                await asyncio.to_thread(hang)
                began = time.monotonic()
            ended = asyncio.ensure_future(asyncio.wait(reading, timeout=STREAM_LIMIT_S))
            told = await truth(client, began, ended.done)
            took_s = time.monotonic() - began
            hanging = [stream for stream, task in zip(streams, reading, strict=True) if not task.done()]
            for task in reading:
                task.cancel()
            while await health(client) != "ok" and time.monotonic() - began < RECOVERY_LIMIT_S:
                await asyncio.sleep(0.25)
            told["health_ok_again_s"] = told["health_ok_again_s"] or round(time.monotonic() - began, 1)
    finally:
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    same = [s for s, text in zip(streams, expected, strict=True) if s.error is None and s.text == text]
    errors = sorted({s.error for s in streams if s.error})
    row = {
        "case": case,
        "same_text": len(same),
        "ended_with_an_error": sum(s.error is not None for s in streams),
        "still_silent": len(hanging),
        "other_text": num_streams - len(same) - sum(s.error is not None for s in streams) - len(hanging),
        "resumed": sum(s.resumed for s in streams),
        "first_token_s": round(max(s.first_token_s for s in streams), 1),
        "resuming_s": round(max(s.resuming_s for s in streams), 1),
        "longest_silence_s": round(max(s.longest_silence_s for s in streams), 1),
        "longest_silence_beyond_prefill_s": round(
            max(s.silence_beyond_prefill_s(from_the_start=case in BEFORE_STREAMS) for s in streams), 1
        ),
        "streams_took_s": round(took_s, 1),
        **told,
        "process_replaced": pid is not None and not psutil.pid_exists(pid),
        "errors": errors,
    }
    print(json.dumps(row), flush=True)
    return row


async def undisturbed(num_streams: int, new_tokens: int) -> tuple[list[str], dict[str, float]]:
    streams = [Stream() for _ in range(num_streams)]
    async with httpx.AsyncClient(timeout=STREAM_LIMIT_S) as client:
        await asyncio.gather(*(s.read(client, i, new_tokens) for i, s in enumerate(streams)))
    assert not any(s.error for s in streams), streams
    waits = {"first_token_s": [s.first_token_s for s in streams], "silence_s": [s.longest_silence_s for s in streams]}
    return [s.text for s in streams], {name: round(max(each), 1) for name, each in waits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--targets", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--part", default="", help="the results' file is hangs_PART.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    alone: dict[str, dict[str, float]] = {}
    about: dict[str, Any] = {"streams": options.streams, "targets": options.targets, "tokens": options.tokens}
    about["load_average_before"] = round(os.getloadavg()[0], 1)  # of a machine that others may use, too
    about |= {"undisturbed": alone, "cases": rows}
    # SmolLM2's three heads of keys are shared by three ranks.
    for ranks, cases in ((1, [case for case in options.only if case != "rank"]), (3, ["rank"])):
        if not set(cases) & set(options.only):
            continue
        with service(targets=options.targets, ranks=ranks):
            expected, alone[f"{ranks} ranks"] = asyncio.run(undisturbed(options.streams, options.tokens))
            for case in cases:
                eventually(lambda: serve.status().applications["rapid"].status == "RUNNING")
                rows.append(asyncio.run(disturbed(case, expected, options.streams, options.tokens)))
                write("hangs", about, part=options.part)  # a later case may fail


if __name__ == "__main__":
    main()
