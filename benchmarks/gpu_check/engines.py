"""Steps, drafts, verifications, prefill and whole requests, through the engine and its tasks."""

from __future__ import annotations

import random
import statistics
import time
import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.device import WEIGHT_BYTES, schemes
from benchmarks.gpu_check.models import (
    Sizes,
    counting_model,
    engine,
    open_sequence,
    ordinary_model,
    synchronize,
    together,
)
from benchmarks.gpu_check.progress import Progress, Result
from rapid.engine.engine import Engine
from rapid.engine.lease import LeasedSequence
from rapid.engine.messages import DraftRequest, VerifyRequest
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, certain_draft

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
# (γ, simulated acceptance, drafter's scheme)
ROUNDS = ((4, 0.77, "none"), (4, 0.77, "int8"), (4, 0.77, "fp8"), (4, 0.77, "int4"), (8, 0.88, "int4"))
VERIFIED = (4, 8)  # draft tokens of a verification


def fits(model: Model, num_tokens: int, device: torch.device) -> bool:
    """Whether keys and values of so many tokens fit into what is free, with a tenth to spare."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    return num_tokens * model.layout.bytes_per_token < 0.9 * torch.cuda.mem_get_info(device)[0]


def steps(progress: Progress, sizes: Sizes, device: torch.device, per_ms: float) -> None:
    """Plain steps and verifications at each number of sequences and context, against the time that reading takes."""
    model = counting_model(sizes, device)
    for context in sizes.contexts:
        for num_sequences in sizes.batches:
            name, room = f"{num_sequences} at {context}", num_sequences * (context + 1280)
            if not fits(model, room, device):
                progress.measure(name, lambda: {"left_out": "more keys and values than memory"})
                continue
            progress.measure(name, lambda c=context, n=num_sequences, r=room: _steps(model, sizes, c, n, r, per_ms))


def _steps(model: Model, sizes: Sizes, context: int, num_sequences: int, room: int, per_ms: float) -> Result:
    floor = (model.info.weight_bytes + num_sequences * context * model.layout.bytes_per_token) / per_ms
    with engine(model, room) as running:
        leases = [open_sequence(running, context, first=17 * i) for i in range(num_sequences)]
        plain = _round_ms(leases, sizes.rounds, 0)
        result: Result = {"plain_ms": plain, "floor_ms": floor, "share_of_floor": floor / plain}
        for gamma in VERIFIED:
            result[f"verify_{gamma + 1}_over_plain"] = _round_ms(leases, sizes.rounds // 2, gamma) / plain
    with engine(model, room) as running:
        leases = [open_sequence(running, context, first=17 * i, sampling=SAMPLED) for i in range(num_sequences)]
        result["sampled_over_greedy"] = _round_ms(leases, sizes.rounds // 2, 0) / plain
    return result


def _round_ms(leases: list[LeasedSequence], rounds: int, gamma: int) -> float:
    """Median milliseconds of rounds over all ``leases`` at once: a verification of ``gamma`` right tokens each."""

    async def timed(lease: LeasedSequence) -> list[float]:
        times = []
        for _ in range(rounds + 2):
            started = time.perf_counter()
            await lease.verify(VerifyRequest(certain_draft(lease.sequence.position, _next(lease, gamma))))
            times.append((time.perf_counter() - started) * 1e3)
        return times

    each = together(*(partial(timed, lease) for lease in leases))
    return statistics.median(ms for times in each for ms in times[2:])  # the first two capture graphs


def _next(lease: LeasedSequence, count: int) -> list[int]:
    """The ``count`` tokens that the model will write."""
    last = (lease.sequence.output or lease.sequence.prompt)[-1]
    vocab_size = lease._engine.model.vocab_size
    return [(last + 1 + i) % vocab_size for i in range(count)]


def drafts(progress: Progress, sizes: Sizes, device: torch.device, per_ms: float) -> None:
    """A draft step of each scheme, sampled and greedy, against the time that reading takes."""
    for scheme in schemes(progress, device):
        progress.measure(scheme, lambda s=scheme: _draft(sizes, device, s, per_ms))


def _draft(sizes: Sizes, device: torch.device, scheme: str, per_ms: float) -> Result:
    model, context = counting_model(sizes, device, scheme), sizes.draft_context
    # The head keeps eight bits or more.
    head = sizes.shape["hidden_size"] * sizes.shape["vocab_size"]
    size = WEIGHT_BYTES[scheme]
    weights = (model_size(sizes) - 2 * head) * size + head * max(1, size)
    floor = (weights + context * model.layout.bytes_per_token) / per_ms
    result: Result = {"floor_ms": floor}
    written = []
    for drafts, kind in ((True, "step"), (False, "stepwise")):
        with engine(model, 4 * context + 8192, drafts=drafts) as running:
            if running._passes.drafts is not None:
                result["draft_graphs"] = len(running._passes.drafts)
            for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
                lease = open_sequence(running, context, first=len(name), sampling=sampling)
                made = [together(partial(_proposal, lease, 8))[0] for _ in range(sizes.rounds // 2)]
                result[f"{name}_{kind}_ms"] = statistics.median(draft.elapsed_ms / 8 for draft in made[1:])
                written.append([draft.tokens for draft in made])
    result["share_of_floor"] = floor / result["greedy_step_ms"]
    result["same_tokens"] = written[:2] == written[2:]
    return result


def model_size(sizes: Sizes) -> int:
    """The number of weights of ``sizes``."""
    shape = sizes.shape
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer + 2 * hidden * shape["vocab_size"])


async def _proposal(lease: LeasedSequence, gamma: int) -> Draft:
    """A draft right behind the prompt; what was drafted before is rolled back."""
    return await lease.propose(DraftRequest(0, [], DraftLimits(gamma)))


def waits(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """How often the host waits for the device: in a draft of eight tokens, a plain step and a verification."""
    if device.type != "cuda":
        progress.measure("left out", lambda: {"left_out": "a CPU does not wait for a device"})
        return
    model = counting_model(sizes, device)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        progress.measure(name, lambda s=sampling: _waits(model, s, sizes.contexts[0]))


def _waits(model: Model, sampling: SamplingParams, context: int) -> Result:
    with engine(model, 2 * context + 4096, drafts=True) as running:
        lease, drafting = (open_sequence(running, context, first=i, sampling=sampling) for i in range(2))

        def count(step: Any) -> int:
            together(step)  # captures, allocates
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    together(step)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            return sum("synchroniz" in str(warning.message) for warning in seen)

        def verification(gamma: int) -> Any:
            return lambda: lease.verify(VerifyRequest(certain_draft(lease.sequence.position, _next(lease, gamma))))

        return {
            "plain": count(verification(0)),
            "verification of 4": count(verification(4)),
            "draft of 8": count(lambda: _proposal(drafting, 8)),
        }


def prefill(progress: Progress, sizes: Sizes, device: torch.device, per_ms_products: float) -> None:
    """Reading a prompt alone, as a share of the matrix products' peak."""
    model = counting_model(sizes, device)
    for context in sizes.contexts[1:]:
        progress.measure(str(context), lambda c=context: _prefill(model, sizes, c, per_ms_products))


def _prefill(model: Model, sizes: Sizes, context: int, per_ms_products: float) -> Result:
    # Two operations a weight and token; attention to half the context on average: four a head dimension and key.
    body = model_size(sizes) - 2 * sizes.shape["hidden_size"] * sizes.shape["vocab_size"]
    work = context * (2 * body + 2 * sizes.shape["num_hidden_layers"] * sizes.shape["hidden_size"] * context)
    with engine(model, context + 4096) as running:
        lease = open_sequence(running, context, read=False)
        started = time.perf_counter()
        together(lease.prefill)
        synchronize(model.layout.device)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens_per_s": context / seconds,
        "share_of_peak": work / (seconds * 1e3) / per_ms_products,
        "passes": running.stats().forward_passes,
    }


def requests(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """Tokens per second: plain, with drafters at a simulated acceptance, and of eight at once against one."""
    context = sizes.contexts[-1]
    target = counting_model(sizes, device)
    plain = progress.measure("plain", lambda: _plain(target, sizes, context, 1))
    many, shorter = max(sizes.batches[:2]), sizes.contexts[0]
    progress.measure(f"plain, 1 at {shorter}", lambda: _plain(target, sizes, shorter, 1))
    progress.measure(f"plain, {many} at {shorter}", lambda: _plain(target, sizes, shorter, many))
    here = schemes(progress, device)
    for gamma, acceptance, scheme in ROUNDS:
        if scheme not in here:
            continue
        name = f"γ {gamma}, {acceptance} accepted, drafter {scheme}"

        def measured(g: int = gamma, a: float = acceptance, s: str = scheme) -> Result:
            drafter = counting_model(sizes, device, s)
            result = _drafted(target, drafter, sizes, context, g, a)
            result["over_plain"] = result["tokens_per_s"] / plain["tokens_per_s"]
            return result

        progress.measure(name, measured)


def _plain(model: Model, sizes: Sizes, context: int, num_sequences: int) -> Result:
    with engine(model, num_sequences * (context + 1280)) as running:
        leases = [open_sequence(running, context, first=17 * i) for i in range(num_sequences)]
        _round_ms(leases, 4, 0)
        started, before = time.perf_counter(), [lease.sequence.position for lease in leases]
        _round_ms(leases, 2 * sizes.rounds, 0)
        seconds = time.perf_counter() - started
        written = sum(lease.sequence.position - b for lease, b in zip(leases, before, strict=True))
    return {"tokens_per_s": written / seconds}


def _drafted(target: Model, drafter: Model, sizes: Sizes, context: int, gamma: int, acceptance: float) -> Result:
    chance = random.Random(0)

    async def run(far: LeasedSequence, near: LeasedSequence) -> Result:
        drafted = accepted = written = 0
        offset, tokens = 0, list[int]()
        started = time.perf_counter()
        for i in range(2 * sizes.rounds):
            if i == 2:  # the first two rounds capture graphs
                started, drafted, accepted, written = time.perf_counter(), 0, 0, 0
            draft = await near.propose(DraftRequest(offset, tokens, DraftLimits(gamma)))
            tokens_drafted = [t if chance.random() < acceptance else (t + 7) % target.vocab_size for t in draft.tokens]
            offset += len(tokens)
            verdict = await far.verify(VerifyRequest(certain_draft(offset, tokens_drafted)))
            tokens = verdict.tokens
            drafted, accepted = drafted + verdict.num_drafted, accepted + verdict.num_accepted
            written += len(tokens)
        seconds = time.perf_counter() - started
        text = far.sequence.output
        last = far.sequence.prompt[-1]
        right = text == [(last + 1 + i) % target.vocab_size for i in range(len(text))]
        return {
            "tokens_per_s": written / seconds,
            "accepted_of_drafted": accepted / max(1, drafted),
            "text_is_right": right,
        }

    near_context = sizes.draft_context
    with engine(target, context + 4096) as far, engine(drafter, near_context + 4096, drafts=True) as near:
        # Both prompts end with the same token.
        leases = open_sequence(far, context, first=0), open_sequence(near, near_context, first=context - near_context)
        result: Result = together(partial(run, *leases))[0]
        return result


def seeds(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """The same seed alone and among seven other sequences: how many of the requests have the same text.

    The text of a model that counts is known, so here the network is of ordinary random weights.
    """
    progress.measure("temperature 0.7", lambda: _seeds(sizes, device))


def _seeds(sizes: Sizes, device: torch.device) -> Result:
    model, context, length = ordinary_model(sizes, device), 300, 24

    def texts(running: Engine, seeds: list[int], first: int) -> list[list[int]]:
        sampling = [SamplingParams(temperature=0.7, seed=seed) for seed in seeds]
        leases = [
            open_sequence(running, context, first=first + i, sampling=s, read=False) for i, s in enumerate(sampling)
        ]
        together(*(lease.prefill for lease in leases))
        _round_ms(leases, length - 2, 0)
        written = [lease.sequence.output[:length] for lease in leases]
        for lease in leases:
            running.close(lease.sequence)
        return written

    same = 0
    with engine(model, 9 * 2048) as running:
        for seed in range(20):
            alone = texts(running, [seed], 5)[0]
            same += texts(running, [seed, *range(100, 107)], 5)[0] == alone
    return {"same": same, "of": 20}
