"""Sampled output of each verification rule against its closed form: total variation, position by position.

The closed forms (`benchmarks.common.closed_forms`) are written from the paper's formulas in logits, in float64,
independently of the code that they check.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import rapid  # noqa: F401 (before torch)

# isort: split
import numpy as np
import torch
from torch import Tensor

from benchmarks.common.closed_forms import Array, bound, chosen_strength, law, softmax
from benchmarks.common.dense_rounds import verify_dense
from benchmarks.common.results import write
from benchmarks.common.table_engine import MAX_ROUNDS, transitions
from rapid.datastore.search import Datastore, Segment, suffix_array
from rapid.engine.verdicts import How, Verify, verdict
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import sample
from rapid.speculation.draft import Draft
from rapid.speculation.trust_region import MEMORY, choose, running_agreement
from rapid.speculation.verification import RULES, TAIL

GAMMA, VOCAB = 3, 10
_AT_ONCE = 2000  # sequences
MOST_NATS = 0.4  # ε_max · c, where η is "auto"


# (rule, T, Tₓ, draft_top_k)
EVERYWHERE = [("augmented", 0.3, 1.0, 4), ("published", 1.0, 1.0, VOCAB), ("reference", 0.7, 0.5, 6)]


def chosen(rule: str, p: Tensor, q: Tensor) -> Tensor:
    """η "auto" of a round's γ positions, as the engine chooses it: [γ, 1]."""
    agreements = torch.minimum(p, q).double().sum(-1)
    running = running_agreement(torch.ones(1, dtype=torch.float64), agreements[None])
    most = MOST_NATS * running[0, :-1, None]
    return choose(RULES[rule], p, q, most, torch.ones_like(most)).strength.float()


def closed_chosen(rule: str, z: Array, q: Array, temperature: float) -> list[float]:
    """The same from the formulas, position by position."""
    etas, agreement = [], 1.0
    for logits, probs in zip(z, q, strict=True):
        epsilon = bound(logits, probs, MOST_NATS * agreement, temperature)
        etas.append(chosen_strength(rule, logits, probs, epsilon, temperature))
        agreement = MEMORY * agreement + (1 - MEMORY) * np.minimum(softmax(logits / temperature), probs).sum()
    return etas


def worst_distance(
    rule: str, eta: float | Literal["auto"], temperature: float, draft_top_k: int, rounds: int
) -> dict[str, float]:
    """Total variation at each draft position, if all tokens before it were accepted, and the identity's error."""
    rng = np.random.default_rng(2)
    z = 1.2 * rng.standard_normal((GAMMA + 1, VOCAB))
    # The drafter is close to the target, so that most rounds reach the last position.
    q = torch.zeros(GAMMA, VOCAB)
    for row, logits in zip(q, z + 0.2 * rng.standard_normal(z.shape), strict=False):
        top, indices = (torch.from_numpy(logits) / temperature).softmax(-1).float().topk(draft_top_k)
        row[indices] = top / top.sum()
    p = (torch.from_numpy(z) / temperature).softmax(-1)

    noise = Noise(torch.arange(rounds))  # rounds of requests with different seeds
    draft = sample(q.expand(rounds, GAMMA, VOCAB), noise.keys(Purpose.DRAFT, torch.arange(GAMMA)))
    num_accepted, next_token = verify_dense(
        RULES[rule],
        draft,
        q.expand(rounds, GAMMA, VOCAB),
        p.float().expand(rounds, GAMMA + 1, VOCAB),
        chosen(rule, p[:GAMMA].float(), q).repeat(rounds, 1) if eta == "auto" else eta,
        noise,
    )
    emitted = torch.cat([draft, draft[:, :1]], -1).scatter(-1, num_accepted[:, None], next_token[:, None])
    q_rows = q.double() / q.double().sum(-1, keepdim=True)
    etas = closed_chosen(rule, z[:GAMMA], q_rows.numpy(), temperature) if eta == "auto" else [eta] * GAMMA
    distances, samples, identity = [], [], 0.0
    for position in range(GAMMA):
        q_exact = q_rows[position]
        expected = law(rule, z[position], q_exact.numpy(), etas[position], temperature)
        reached = emitted[num_accepted >= position, position]
        shares = torch.bincount(reached, minlength=VOCAB).double() / len(reached)
        distances.append(float((shares - torch.from_numpy(expected)).abs().sum() / 2))
        samples.append(len(reached))
        augmented = RULES[rule].augment(p[position], q_exact, etas[position])
        accepted = torch.minimum(q_exact, augmented)
        out = accepted + (1 - accepted.sum()) * RULES[rule].residual(p[position], q_exact, augmented)
        identity = max(identity, float((out - torch.from_numpy(expected)).abs().max()))
    return {
        "total_variation": max(distances),
        "samples": min(samples),
        "identity_error_float64": identity,
        "distance_to_target": float(np.abs(expected - softmax(z[GAMMA - 1] / temperature)).sum() / 2),
    }


def of_a_datastore(temperature: float, rounds: int) -> dict[str, float]:
    """The worst total variation to p at the positions of drafts by `rest`: found in random texts, with a one-hot q.

    p has enough for the drafted tokens that most rounds reach the last position.
    """
    rng = np.random.default_rng(3)
    texts = rng.integers(0, VOCAB, 4000).astype(np.uint32)
    found = Datastore([Segment(texts, suffix_array(texts))]).find(texts[100:116].tolist())
    assert found is not None and len(found.tokens) >= GAMMA
    drafted = torch.tensor(found.tokens[:GAMMA])
    z = torch.from_numpy(1.2 * rng.standard_normal((GAMMA + 1, VOCAB)))
    z[torch.arange(GAMMA), drafted] = z[:GAMMA].amax(-1) + 2 * temperature
    p = (z / temperature).softmax(-1)
    q = torch.nn.functional.one_hot(drafted, VOCAB).float()
    draft = drafted.expand(rounds, GAMMA)
    num_accepted, next_token = verify_dense(
        RULES["lossless"],
        draft,
        q.expand(rounds, GAMMA, VOCAB),
        p.float().expand(rounds, GAMMA + 1, VOCAB),
        0.0,
        Noise(torch.arange(rounds)),
    )
    emitted = torch.cat([draft, draft[:, :1]], -1).scatter(-1, num_accepted[:, None], next_token[:, None])
    distances, samples = [], []
    for position in range(GAMMA + 1):  # the last is the bonus token's
        reached = emitted[num_accepted >= position, position]
        shares = torch.bincount(reached, minlength=VOCAB).double() / len(reached)
        distances.append(float((shares - p[position]).abs().sum() / 2))
        samples.append(len(reached))
    return {"total_variation": max(distances), "samples": min(samples)}


def of_a_transfer_everywhere(
    rule: str, eta: float, temperature: float, transfer_temperature: float, draft_top_k: int, num_samples: int
) -> dict[str, float]:
    """The worst total variation to softmax((z + η·Tₓ·(q − p))/T), at γ + 1 positions with a q, as engines verify them.

    The drafted tokens are the likeliest, so that most rounds reach the last position.
    """
    rng = np.random.default_rng(4)
    z = rng.standard_normal((GAMMA + 1, VOCAB))
    z[np.arange(GAMMA + 1), rng.integers(VOCAB, size=GAMMA + 1)] = z.max(-1) + 2 * temperature
    p = np.stack([softmax(row / transfer_temperature) for row in z])
    q = np.stack([softmax(row / transfer_temperature) for row in z + 0.3 * rng.standard_normal(z.shape)])
    q[q < np.sort(q, -1)[:, -draft_top_k, None]] = 0
    q /= q.sum(-1, keepdims=True)
    shift = q - p
    if rule == "reference":
        shift[q < TAIL * q.max(-1, keepdims=True)] = 0
    law_of_rows = [softmax(row / temperature) for row in z + eta * transfer_temperature * shift]
    pairs = [(np.flatnonzero(row).astype(np.int32), row[row > 0].astype(np.float32)) for row in q]
    likeliest = [int(row.argmax()) for row in law_of_rows]
    draft = Draft(0, likeliest[:GAMMA], pairs[:GAMMA], [1.0] * GAMMA)
    logits, counts, first = torch.from_numpy(z).float(), np.zeros((GAMMA + 1, VOCAB), np.int64), 0
    while counts.sum(-1).min() < num_samples:
        hows = [
            How(SamplingParams(temperature=temperature), seed, pairs, RULES[rule], eta, transfer_temperature)
            for seed in range(first, first + _AT_ONCE)
        ]
        for how, values in zip(hows, Verify.together([Verify(logits, draft, how) for how in hows]), strict=True):
            for place, token in enumerate(verdict(values.numpy(), draft, how).emitted):
                counts[place, token] += 1
        first += _AT_ONCE
    samples = counts.sum(-1)
    distances = np.abs(counts / samples[:, None] - law_of_rows).sum(-1) / 2
    moved = np.abs(np.stack([softmax(row / temperature) for row in z]) - law_of_rows).sum(-1) / 2
    return {
        "total_variation": float(distances.max()),
        "samples": int(samples.min()),
        "distance_to_target": float(moved.min()),
    }


def of_self_drafting(bottom: str | None, num_samples: int) -> dict[str, Any]:
    """What the tasks that draft over a view write at each place of a round, against the target's own p."""
    torch.set_num_threads(1)  # tables are small: other threads would only wait
    counts, samples, first_seed = np.zeros((1, 1, 1), np.int64), np.zeros(1), 0
    while samples.min() < num_samples:
        more, law_of_target = transitions(
            bottom, SamplingParams(temperature=0.8), 3, num=_AT_ONCE, num_rounds=MAX_ROUNDS, first_seed=first_seed
        )
        first_seed, counts = first_seed + _AT_ONCE, counts + more
        samples = counts.sum((1, 2))
    shares = counts / counts.sum(2, keepdims=True)
    distances = (np.abs(shares - law_of_target).sum(2) / 2 * counts.sum(2)).sum(1) / samples
    return {"samples": samples.astype(int).tolist(), "total_variation": distances.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=900_000, help="of the rules, and of drafts from a datastore")
    parser.add_argument(
        "--only",
        choices=["rules", "everywhere", "rest", "magicdec", "triforce-model", "triforce-lookup"],
        help="one part of it, into output_law_ONLY.json",
    )
    parser.add_argument("--samples", type=int, default=200_000, help="at each place of a round that engines verify")
    options = parser.parse_args()
    results: dict[str, Any] = {"rounds": options.rounds}
    if options.only in (None, "rules"):
        results |= of_the_rules(options.rounds)
    if options.only in (None, "everywhere"):
        results["everywhere"] = [
            {"rule": rule, "eta": 10.0, "temperature": t, "transfer_temperature": tx, "draft_top_k": k}
            | of_a_transfer_everywhere(rule, 10.0, t, tx, k, options.samples)
            for rule, t, tx, k in EVERYWHERE
        ]
        for row in results["everywhere"]:
            print(f"a transfer at every position: {row}")
    if options.only in (None, "rest"):
        results["rest"] = [{"temperature": t} | of_a_datastore(t, options.rounds) for t in (0.5, 1.0)]
        print(f"rest: {results['rest']}")
    for name, bottom in (("magicdec", None), ("triforce-model", "model"), ("triforce-lookup", "lookup")):
        if options.only in (None, name):
            results[name] = of_self_drafting(bottom, options.samples)
            print(f"{name}: by place in the round {results[name]}")
    write("output_law", results, part=options.only or "")


def of_the_rules(rounds: int) -> dict[str, Any]:
    """`worst_distance` of every rule at several η, temperatures and truncations."""
    rows: list[dict[str, Any]] = []
    print(f"{'rule':10} {'η':>4} {'T':>4} {'k':>3} {'TV to the law':>14} {'samples':>8} {'identity':>9} {'TV to p':>8}")
    for rule in RULES:
        for eta in (0.0, 5.0, 10.0, 20.0, "auto"):
            for temperature in (0.5, 1.0):
                for draft_top_k in (4, VOCAB):
                    row = worst_distance(rule, eta, temperature, draft_top_k, rounds)
                    rows.append(
                        {"rule": rule, "eta": eta, "temperature": temperature, "draft_top_k": draft_top_k} | row
                    )
                    print(
                        f"{rule:10} {eta!s:>4} {temperature:4} {draft_top_k:3} {row['total_variation']:14.4f} "
                        f"{row['samples']:8} {row['identity_error_float64']:9.1e} {row['distance_to_target']:8.3f}"
                    )
    worst = {name: max(row[name] for row in rows) for name in ("total_variation", "identity_error_float64")}
    print(f"worst: {worst}; fewest samples: {min(row['samples'] for row in rows)}")
    return {"worst": worst, "rows": rows}


if __name__ == "__main__":
    main()
