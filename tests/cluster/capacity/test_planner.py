"""The planner's arithmetic against published parameter counts and closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.capacity.devices import GPUS, Device
from cluster.capacity.planner import CALL_S, Planner, Round, Workload, expected_tokens, per_token_acceptance
from cluster.capacity.shapes import SHAPES, ModelShape, ServedModel, known_shape

LLAMA_8B, LLAMA_70B = ServedModel(SHAPES["llama-3.1-8b"]), ServedModel(SHAPES["llama-3.1-70b"])
WORK = Workload(context=120_000, retrieved=5_000, batch=4, acceptance=0.77)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_parameters_are_those_of_the_published_weights(name: str, published: int) -> None:
    assert SHAPES[name].num_parameters == published


def test_bytes_of_llama_8b() -> None:
    assert LLAMA_8B.bytes_held == pytest.approx(16.06e9, rel=1e-3)
    assert LLAMA_8B.kv_bytes_per_token == 131_072
    halves = ServedModel(LLAMA_8B.shape, num_ranks=2)
    assert (halves.bytes_held, halves.kv_bytes_per_token) == (LLAMA_8B.bytes_held / 2, 65_536)
    assert ServedModel(LLAMA_8B.shape, num_ranks=16).kv_bytes_per_token == 131_072 / 8  # a KV head is not cut
    assert LLAMA_8B.sequences_that_fit(131_072 * 4000, 1000) == 4


def test_a_quantised_head_does_not_share_the_embedding_table() -> None:
    shape = SHAPES["smollm2-135m"]
    extra = ServedModel(shape, weight_bytes=1.0).bytes_held - shape.num_parameters
    assert extra == shape.head_parameters * 2


def test_names_are_found_with_organisation_and_suffix() -> None:
    assert known_shape("meta-llama/Llama-3.1-8B-Instruct") is SHAPES["llama-3.1-8b"]
    assert known_shape("smollm2-135m-instruct") is SHAPES["smollm2-135m"]
    assert known_shape("someone/else") is None


def test_a_config_that_is_not_of_the_family_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type is qwen3_moe"):
        ModelShape.from_config({"model_type": "qwen3_moe"})
    with pytest.raises(ValueError, match="no 'num_hidden_layers'"):
        ModelShape.from_config({"model_type": "llama"})


def test_a_decode_step_is_the_bytes_over_the_bandwidth() -> None:
    ideal = Device(1e12, 1e12, 1e30, weights=1, cache=1, products=1, attention=1, layer_s=0)
    read = (LLAMA_8B.shape.num_parameters - LLAMA_8B.shape.head_parameters) * 2 + 1000 * 131_072
    assert ideal.pass_s(LLAMA_8B, 1, 1, 999) == pytest.approx(read / 1e12)


def test_a_long_pass_is_the_operations_over_the_rate() -> None:
    ideal = Device(1e12, 1e15, 1e12, weights=1, cache=1, products=1, attention=1, layer_s=0)
    shape = LLAMA_8B.shape
    products = 2 * shape.layer_parameters * 1000 + 2 * shape.head_parameters
    attention = 4 * 32 * 4096 * (1000 * 1001 / 2)
    assert ideal.pass_s(LLAMA_8B, 1, 1000, 0, rows=1) == pytest.approx((products + attention) / 1e12)
    float32 = ServedModel(shape, weight_bytes=4, number_bytes=4)
    assert ideal.pass_s(float32, 1, 1000, 0, rows=1) == pytest.approx(2 * (products + attention) / 1e12)


def test_a_prefill_costs_the_same_operations_in_any_chunks() -> None:
    ideal = Device(1e12, 1e18, 1e12, weights=1, cache=1, products=1, attention=1, layer_s=0)
    assert ideal.prefill_s(LLAMA_8B, 1000, 100) == pytest.approx(ideal.prefill_s(LLAMA_8B, 1000, 1000))


def test_ranks_divide_the_reading_and_pay_for_the_joining() -> None:
    device = replace(GPUS["h100"], eager_layer_s=0)
    one, eight = (device.pass_s(ServedModel(LLAMA_70B.shape, num_ranks=n), 1, 1, 1000) for n in (1, 8))
    joining = 2 * 80 * (device.link_latency_s + 2 * 7 / 8 * 8192 * 2 / device.link)
    launching = 80 * device.layer_s
    assert eight - launching - joining == pytest.approx((one - launching) / 8)


def test_what_several_devices_share_is_no_faster_than_its_kernels_are_launched() -> None:
    """Such passes are not captured as CUDA graphs."""
    device = GPUS["h100"]
    for model in (ServedModel(LLAMA_8B.shape, num_ranks=8), ServedModel(SHAPES["llama-3.2-1b"], num_stages=2)):
        launching = model.shape.num_layers * device.eager_layer_s
        assert device.pass_s(model, 1, 1, 10) == launching > device.pass_s(ServedModel(model.shape), 1, 1, 10) / 4
        assert device.pass_s(model, 1, 2048, 100_000) > launching
    assert device.pass_s(ServedModel(SHAPES["llama-3.2-1b"]), 1, 1, 10) < launching


def test_messages_cost_what_they_were_measured_to_cost() -> None:
    found = json.loads((Path(__file__).parents[3] / "benchmarks/results/coordination.json").read_text("utf-8"))
    assert found["empty"]["coordination_ms_median"] <= 2e3 * CALL_S
    assert pytest.approx(found["sampling"]["coordination_ms_median"], rel=0.1) == 2e3 * CALL_S


def test_stages_divide_the_memory_and_not_the_time() -> None:
    device = replace(GPUS["h100"], eager_layer_s=0)
    one, four = ServedModel(LLAMA_70B.shape), ServedModel(LLAMA_70B.shape, num_stages=4)
    assert four.bytes_held == one.bytes_held / 4 and four.kv_bytes_per_token == one.kv_bytes_per_token / 4
    assert ServedModel(LLAMA_70B.shape, num_stages=3).kv_bytes_per_token == one.kv_bytes_per_token * 27 / 80
    handing_on = 3 * (device.link_latency_s + 5 * 8192 * 2 / device.link)
    assert device.pass_s(four, 1, 5, 1000) == pytest.approx(device.pass_s(one, 1, 5, 1000) + handing_on)
    planner = Planner(device, four, LLAMA_8B, WORK)
    assert planner.fleet_for_users(planner.round(0), users=8).gpus == 2 * 4


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
def test_expected_tokens_are_the_geometric_sum(acceptance: float) -> None:
    assert expected_tokens(acceptance, 5) == pytest.approx((1 - acceptance**6) / (1 - acceptance))
    assert expected_tokens(1.0, 5) == 6


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_the_rate_of_accepted_to_drafted_gives_the_acceptance_of_one_token(acceptance: float) -> None:
    rate = (expected_tokens(acceptance, 5) - 1) / 5
    assert per_token_acceptance(rate, 5) == pytest.approx(acceptance, abs=1e-9)


def test_rounds() -> None:
    def took(acceptance: float, *, gamma: int = 3, overlap: bool = False) -> float:
        return Round(gamma, acceptance, draft_s=1.0, verify_s=10.0, overlap=overlap, call_s=0.5).round_s

    assert took(0.5, gamma=0) == 10.5
    assert took(0.5) == 3 + 10 + 1
    assert took(1.0, overlap=True) == 10 + 1  # four steps fit into the verification
    assert took(0.0, overlap=True) == took(0.0)  # every guess is wrong
    assert Round(3, 1.0, 4.0, 10.0, True, 0.0).round_s == 16  # the drafter alone sets the pace


def test_the_best_number_of_draft_tokens_grows_with_acceptance_and_is_none_where_nothing_stands() -> None:
    drafter = ServedModel(LLAMA_8B.shape, weight_bytes=0.625)
    best = [
        Planner(GPUS["h200"], LLAMA_8B, drafter, Workload(120_000, 5_000, 4, acceptance)).best_round().gamma
        for acceptance in (0.0, 0.5, 0.9)
    ]
    assert best[0] == 0 and best == sorted(best) and best[2] > best[1]


def test_overlap_never_slows_a_round() -> None:
    planner = Planner(GPUS["h200"], LLAMA_8B, LLAMA_8B, WORK)
    for gamma in range(1, 9):
        assert planner.round(gamma, overlap=True).tokens_per_second >= planner.round(gamma).tokens_per_second


def test_a_fleet_carries_its_load_at_its_price() -> None:
    planner = Planner(GPUS["h200"], LLAMA_70B, LLAMA_8B, WORK)
    plain = planner.round(0)
    fleet = planner.fleet_for_users(plain, users=9, price=3.6)
    assert (fleet.targets, fleet.drafters, fleet.gpus) == (3, 0, 3)
    assert fleet.cost == pytest.approx(3 * 0.001 / fleet.tokens_per_second * 1e6)
    assert replace(planner, other_gpus=2).fleet_for_users(plain, users=9).gpus == 3 + 2
    drafted = planner.round(4)
    assert planner.fleet_for_users(drafted, users=9).drafters >= 1
    twice = [planner.fleet_for_load(drafted, rate).targets for rate in (5.0, 10.0)]
    users = planner.users_carried(drafted, 30, 1)
    assert planner.users_carried(plain, 30, 0) == planner.users_carried(drafted, 30, 9) == 30 * 4 > users
    drafters = [planner.fleet_for_users(drafted, number).drafters for number in (users, users + 1)]
    assert drafters == [1, 2]
    assert twice[1] == pytest.approx(2 * twice[0], abs=1)


def test_what_drafts_on_the_target_needs_no_further_gpu_and_holds_two_prompts() -> None:
    planner = Planner(GPUS["h200"], LLAMA_8B, None, WORK)
    assert planner.fleet_for_users(planner.round(2, overlap=True), users=4).gpus == 1
    assert not planner.round(2, overlap=True).overlap
    assert planner.target_seats < Planner(GPUS["h200"], LLAMA_8B, LLAMA_8B, WORK).target_seats


def test_grouped_heads_that_ranks_do_not_divide() -> None:
    shape = ModelShape(1, 64, 128, 9, 3, 8, 100)
    assert ServedModel(shape, num_ranks=2).kv_bytes_per_token == 2 * 2 * 8 * 2
