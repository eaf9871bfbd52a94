"""The cost of a round besides the models: γ = 10, a vocabulary of 128,256, draft_top_k at its default.

The coordinator asks for a draft and has it verified, each by a process of its own, over the channels of two leases. The
first measurement uses engines that compute nothing and answer at once. The second uses tiny models that sample and
verify. There a round's coordination is its time minus the times that the two engines report, and processes that have
slept for a while are slower to wake.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import ray
from ray import serve
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.common.results import write
from deployments.app import build
from deployments.config import parse_config
from deployments.serve.backend import RayBackend, lease_over
from deployments.serve.channel import Address, Channel, Listener
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult
from rapid.speculation.params import SpeculationParams

GAMMA, VOCAB = 10, 128_256
TOP_K = SpeculationParams().draft_top_k


def save_next_to_nothing(folder: Path) -> None:
    """A model of one layer with 16 numbers, and a tokenizer with as many words as there are tokens."""
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)


class EmptyEngine:
    """Answers like an engine, with drafts and verdicts that are always the same."""

    async def listen(self) -> Address:
        address = ray.util.get_node_ip_address()
        self._listener = await Listener.start(address, {"call": self.call}, ended=self.ended)
        return self._listener.address

    async def ended(self, lease_id: str) -> None:
        pass

    async def call(self, lease_id: str, method: str, request: Any) -> Draft | VerifyResult:
        if method == "verify":
            draft = request.draft
            return VerifyResult([*draft.tokens, VOCAB - 1], GAMMA, GAMMA, 0, draft.confidences, 0.0, 0.0, 0.0)
        weights = np.full(TOP_K, 1 / TOP_K, np.float32)
        pairs = [(np.arange(i, i + TOP_K, dtype=np.int32), weights) for i in range(GAMMA)]
        return Draft(request.offset, list(range(GAMMA)), pairs, [0.5] * GAMMA)


async def empty_rounds(num: int) -> dict[str, Any]:
    actors = [ray.remote(EmptyEngine).remote() for _ in range(2)]
    addresses = [await actor.listen.remote() for actor in actors]  # type: ignore[attr-defined]
    channels = [await Channel.connect(address.for_channel("lease"), "lease") for address in addresses]
    target, drafter = map(lease_over, channels)
    times = []
    for i in range(num):
        started = time.perf_counter()
        draft = await drafter.propose(DraftRequest(i, [1, 2, 3], DraftLimits(GAMMA)))
        await target.verify(VerifyRequest(draft, transfers=True))
        times.append((time.perf_counter() - started) * 1e3)
    times = times[num // 10 :]  # after connections are made
    return {
        "coordination_ms_median": round(statistics.median(times), 2),
        "coordination_ms_p95": round(statistics.quantiles(times, n=20)[-1], 2),
    }


async def rounds(num: int) -> dict[str, Any]:
    handles = {role: serve.get_deployment_handle(role.capitalize(), "rapid") for role in ("target", "drafter")}
    backend = RayBackend(handles, serve.get_deployment_handle("Retriever", "rapid"), overlap=False)
    await backend.connect()
    costs, whole, sizes = [], [], []
    async with AsyncExitStack() as stack:
        room = num * (GAMMA + 1) + GAMMA + 1
        target, drafter = [
            await stack.enter_async_context(backend.lease(role, SequenceRequest([5] * 300, room, SamplingParams())))
            for role in ("target", "drafter")
        ]
        await asyncio.gather(target.prefill(), drafter.prefill())
        knows, output = 0, list[int]()
        for _ in range(num):
            started = time.perf_counter()
            draft = await drafter.propose(DraftRequest(knows, output[knows:], DraftLimits(GAMMA)))
            verified = await target.verify(VerifyRequest(draft, transfers=True))
            took = (time.perf_counter() - started) * 1e3
            knows = len(output)
            output += verified.tokens
            whole.append(took)
            costs.append(took - verified.draft_ms - verified.verify_ms)
            sizes.append((len(cloudpickle.dumps(draft)), len(cloudpickle.dumps(verified))))
    skip = num // 10  # while connections are made
    drafts, verdicts = zip(*sizes, strict=True)
    return {
        "rounds": num,
        "draft_top_k": TOP_K,
        "coordination_ms_median": round(statistics.median(costs[skip:]), 2),
        "coordination_ms_p95": round(statistics.quantiles(costs[skip:], n=20)[-1], 2),
        "round_ms_median": round(statistics.median(whole[skip:]), 2),
        "draft_bytes_median": statistics.median(drafts),
        "verdict_bytes_median": statistics.median(verdicts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_next_to_nothing(Path(folder))
        engine = {"model": folder, "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
        ray.init(include_dashboard=False, num_cpus=4, log_to_driver=False)
        try:
            empty = asyncio.run(empty_rounds(options.rounds))
            serve.run(build(parse_config({"target": engine, "drafter": engine})), name="rapid")
            results = {"empty": empty, "sampling": asyncio.run(rounds(options.rounds))}
        finally:
            serve.shutdown()
            ray.shutdown()
    print(results)
    write("coordination", {"vocabulary": VOCAB, "draft_tokens": GAMMA} | results)


if __name__ == "__main__":
    main()
