"""The simulation where its answer is known: one user, and engines that are always busy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.capacity.planner import Round, expected_tokens
from cluster.capacity.simulation import Setup, every_ratio, simulate

ONE = Setup(
    num_users=1,
    num_targets=1,
    num_drafters=1,
    gamma=3,
    acceptance=0.7,
    verify_s=lambda batch, gamma: 4.0,
    draft_s=lambda batch: 1.0,
    call_s=0.0,
)


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("gamma", [0, 1, 3, 6])
def test_one_user_has_the_round_model(acceptance: float, overlap: bool, gamma: int) -> None:
    setup = replace(ONE, acceptance=acceptance, overlap=overlap, gamma=gamma)
    expected = Round(gamma, acceptance, draft_s=1.0, verify_s=4.0, overlap=overlap, call_s=0.0)
    assert simulate(setup, rounds=4000).tokens_per_second == pytest.approx(expected.tokens_per_second, rel=0.02)


def test_calls_count_as_in_the_round_model() -> None:
    for gamma, overlap in ((0, False), (3, False), (3, True)):
        setup = replace(ONE, acceptance=1.0, overlap=overlap, gamma=gamma, call_s=0.25)
        expected = Round(gamma, 1.0, draft_s=1.0, verify_s=4.0, overlap=overlap, call_s=0.25)
        assert simulate(setup, rounds=1000).tokens_per_second == pytest.approx(expected.tokens_per_second, rel=0.005)


def test_busy_targets_set_the_pace() -> None:
    """Where a pass costs 4 s a sequence, a target writes a round's tokens every 4 s, however many draft for it."""
    setup = replace(ONE, num_users=60, num_targets=2, num_drafters=8, verify_s=lambda batch, gamma: 4.0 * batch)
    outcome = simulate(setup, rounds=200)
    assert outcome.tokens_per_second == pytest.approx(2 * expected_tokens(0.7, 3) / 4.0, rel=0.03)
    assert outcome.target_busy == pytest.approx(1.0, abs=0.03)


def test_busy_drafters_set_the_pace() -> None:
    """Where a draft step costs 1 s a sequence, a drafter brings a round's tokens every γ seconds."""
    setup = replace(ONE, num_users=40, num_targets=40, num_drafters=2, draft_s=float, verify_s=lambda batch, gamma: 0.1)
    outcome = simulate(setup, rounds=200)
    assert outcome.tokens_per_second == pytest.approx(2 * expected_tokens(0.7, 3) / 3, rel=0.02)
    assert outcome.drafter_busy == pytest.approx(1.0, abs=0.01)


def test_overlap_wastes_what_was_guessed_wrongly() -> None:
    assert simulate(replace(ONE, overlap=True, acceptance=1.0)).draft_waste == pytest.approx(0, abs=0.01)
    # A verification lasts four steps, all for nothing, and three more make the draft.
    assert simulate(replace(ONE, overlap=True, acceptance=0.0)).draft_waste == pytest.approx(4 / 7, rel=0.01)
    assert simulate(replace(ONE, acceptance=0.0)).draft_waste == pytest.approx(0, abs=0.01)


def test_one_seed_one_outcome() -> None:
    setup = replace(ONE, num_users=7, num_targets=2, overlap=True)
    assert simulate(setup, seed=3) == simulate(setup, seed=3)
    assert simulate(setup, seed=3) != simulate(setup, seed=4)


def test_every_ratio_is_tried_and_targets_alone_decode_plainly() -> None:
    outcomes = every_ratio(replace(ONE, num_users=8), 4, rounds=10)
    assert [(it.num_targets, it.num_drafters) for it in outcomes] == [(1, 3), (2, 2), (3, 1), (4, 0)]
    assert outcomes[-1].gamma == 0 and outcomes[0].gamma > 0


def test_gpus_of_sharded_engines() -> None:
    outcomes = every_ratio(replace(ONE, num_users=4), 8, target_gpus=1, drafter_gpus=4, rounds=5)
    assert [(it.num_targets, it.num_drafters) for it in outcomes] == [(4, 1), (8, 0)]


def test_a_cheap_drafter_serves_many_targets() -> None:
    setup = replace(ONE, num_users=64, acceptance=0.9, target_seats=4, draft_s=lambda batch: 0.05)
    best = max(every_ratio(setup, 6, rounds=20), key=lambda it: it.tokens_per_second)
    assert (best.num_targets, best.num_drafters) == (5, 1)


def test_users_without_a_seat_write_nothing() -> None:
    seated = simulate(replace(ONE, num_users=6, num_drafters=2, drafter_seats=2, acceptance=1.0))
    alone = simulate(replace(ONE, num_users=4, num_drafters=2, acceptance=1.0))
    assert seated.tokens_per_second == alone.tokens_per_second
    assert seated.tokens_per_second_per_user == pytest.approx(alone.tokens_per_second_per_user * 4 / 6)
