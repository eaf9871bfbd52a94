"""The planner's checks check: a known machine is found again, and a wrong prediction is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plan import FITTED, SERVED, Pass, fit
from benchmarks.rounds import check_rounds
from cluster.devices import Device
from cluster.plan import Round


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


@pytest.mark.parametrize(("slower", "error"), [(1.0, 0.0), (2.0, 1.0)])
def test_rounds_that_follow_the_model_are_predicted_and_others_are_not(slower: float, error: float) -> None:
    """With γ = 4 twice as slow as the model says, its speed is predicted 100% too high."""
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
    checked = check_rounds(rows)
    assert checked["cost_and_acceptance"]["worst_error"] == pytest.approx(error, abs=2e-3)
