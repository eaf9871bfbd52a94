"""The planner's checks check: a known machine is found again, and a wrong prediction is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plan import COMPILED, FITTED, SERVED, Pass, check_overlap, fit, fit_kernels
from benchmarks.rounds import check_rounds
from cluster.capacity.devices import Device
from cluster.capacity.planner import Round


def test_the_fit_finds_the_machine_that_the_passes_came_from() -> None:
    true = Device(0, 50e9, 2e11, weights=0.4, cache=0.2, products=1, attention=0.3, layer_s=4e-4)
    passes = [
        Pass(weights, context, tokens, true.pass_s(SERVED[weights], 1, tokens, context))
        for weights in SERVED
        for context in (256, 4096, 16384)
        for tokens in (1, 5, 11, 128)
    ]
    found = fit(replace(true, flops=1e11, weights=0.7, cache=0.1, attention=0.5, layer_s=1e-4), passes)
    assert [getattr(found, name) for name in FITTED] == pytest.approx(
        [getattr(true, name) for name in FITTED], rel=0.05
    )


def test_kernels_of_two_kinds_are_two_machines() -> None:
    """One set of constants for both would be wrong for both."""
    fast = Device(0, 30e9, 3e11, weights=0.9, cache=0.6, products=1, attention=0.4, layer_s=2e-4)
    true = dict.fromkeys(COMPILED, fast) | {"float32": replace(fast, weights=0.5, cache=0.25, attention=0.2)}
    passes = [
        Pass(weights, context, tokens, true[weights].pass_s(SERVED[weights], 1, tokens, context))
        for weights in SERVED
        for context in (256, 4096, 16384)
        for tokens in (1, 5, 11)
    ]
    found = fit_kernels(replace(fast, weights=0.7, cache=0.3, attention=0.3, layer_s=3e-4), passes)
    assert max(abs(one.error(found[one.weights])) for one in passes) < 0.05
    assert found["float32"].layer_s == found["int4"].layer_s


@pytest.mark.parametrize(("verify_ms", "ratio"), [(40.0, 70 / 50), (60.0, 1.0)])
def test_drafting_ahead_is_predicted_from_what_the_rounds_cost(verify_ms: float, ratio: float) -> None:
    """A hit hides all of the draft, every second guess is one, and a slower verification may eat that up."""
    off = {"mean_draft_ms": 20.0, "mean_verify_ms": 40.0, "mean_transport_ms": 10.0}
    on = off | {"mean_draft_ms": 99.0, "mean_verify_ms": verify_ms, "mean_transport_ms": 0.0}
    overlap = {"draft_tokens": 2, "hit_rate": 0.5, "on": on, "off": off, "median_ratio": ratio * 2}
    checked = check_overlap(overlap)
    assert checked == {
        "measured": ratio * 2,
        "predicted": pytest.approx(ratio, abs=1e-3),
        "error": 0.5,
        "predicted_apart": pytest.approx(70 / 60, abs=1e-3),
    }


@pytest.mark.parametrize(("slower", "error"), [(1.0, 0.0), (2.0, 1.0)])
def test_rounds_that_follow_the_model_are_predicted_and_others_are_not(slower: float, error: float) -> None:
    """With γ = 4 twice as slow as the model says, its speed is predicted 100% too high; the same where it is chosen."""
    rows = []
    for gamma, factor in ((0, 1.0), (2, 1.0), (4, slower)):
        round_s = Round(gamma, 1.0, 0.02, 0.04, call_s=0.0).round_s * factor
        rows.append(
            {
                "question": "?",
                "gamma": gamma,
                "drafted": 10 * gamma,
                "accepted": 10 * gamma,
                "round_ms": round_s * 1e3,
                "tokens_per_second": (gamma + 1) / round_s,
            }
        )
    token_s = sum((rows[i]["round_ms"] - 40) / rows[i]["gamma"] for i in (1, 2)) / 2e3
    took_s = (5 * 0.04 + 12 * token_s) * slower
    auto = {"gamma": "auto", "rounds": 5, "drafted": 12, "accepted": 12, "tokens_per_second": 17 / took_s}
    checked = check_rounds([*rows, rows[0] | auto])
    assert checked["chosen"]["worst_error"] == pytest.approx(error, abs=2e-3)
    assert checked["cost_and_acceptance"]["worst_error"] == pytest.approx(error, abs=2e-3)
