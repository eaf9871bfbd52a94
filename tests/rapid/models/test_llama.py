"""The lean decoder computes what transformers computes, for every family it takes, and refuses the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import new_cache, random_tokens
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from rapid.errors import ModelFileError
from rapid.kernels.interface import BatchEntry
from rapid.kernels.rows import UNFUSED
from rapid.models.layers import RMSNorm
from rapid.models.model import Model
from rapid.models.registry import ARCHITECTURES

MakeNetwork = Callable[..., PreTrainedModel]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", {"head_dim": 16}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),  # biases on q, k and v
    ("qwen3", {"head_dim": 16}),  # norms on q and k
]


def with_random_vectors(network: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms begin as zeros and ones, and could be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(("kind", "more"), CASES, ids=[f"{kind}-{'-'.join(more)}" for kind, more in CASES])
def test_logits_are_transformers_own(tiny_network: MakeNetwork, kind: str, more: dict[str, Any]) -> None:
    network = with_random_vectors(tiny_network(kind=kind, **more))
    tokens = random_tokens(100, seed=1)
    with torch.inference_mode():
        expected = network(torch.tensor([tokens])).logits[0]
    model = Model(network, None, kind)
    cache, rows = new_cache(model, 100), []
    for chunk in (tokens[:60], tokens[60:99], tokens[99:]):
        rows.append(model.forward([BatchEntry(cache, chunk, len(chunk))])[0])
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-4, atol=2e-5)


def test_every_family_is_tested() -> None:
    assert {kind for kind, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"head_dim": 8}),
        ("olmo2", {}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tiny_network: MakeNetwork, kind: str, more: dict[str, Any]) -> None:
    """Other architectures, other activations, and layers that do not see the whole text."""
    with pytest.raises(ModelFileError, match=f"odd: only .* found {kind}"):
        Model(tiny_network(kind=kind, **more), None, "odd")


def test_another_kind_of_network_altogether_is_refused() -> None:
    network = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    )
    with pytest.raises(ModelFileError, match="found gpt2"):
        Model(network, None, "odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_its_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(5, 7, 32, generator=generator) + 1).to(dtype)
    weight = torch.randn(32, generator=generator).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(RMSNorm(weight, 1e-5, UNFUSED)(x).double(), expected, rtol=tolerance, atol=tolerance)
