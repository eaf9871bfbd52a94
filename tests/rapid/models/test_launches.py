"""A decode pass on CUDA launches few kernels; counted on the meta device, where no kernel runs."""

import pytest

from benchmarks.launches import measured

LAYERS = 32
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 16384,
}


@pytest.fixture(scope="module")
def launches() -> dict[str, int]:
    return {name: found["launches"] for name, found in measured(SHAPE).items()}


def test_a_layer_is_ten_launches_instead_of_twenty(launches: dict[str, int]) -> None:
    """Four products, two of attention, two norms, a rotation and a gate."""
    once = 14  # embedding, angles, the last norm, the head
    assert launches["none, operators"] == 20 * LAYERS + once
    assert launches["none, fused"] == 10 * LAYERS + once


def test_a_packed_product_is_at_most_two(launches: dict[str, int]) -> None:
    assert launches["int4, fused"] == 14 * LAYERS + 15
    assert launches["int4, fused"] == launches["int4, operators"] - 10 * LAYERS
