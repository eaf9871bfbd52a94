"""The size of a model: parameters, bytes of weights, bytes of keys and values, from the numbers of its config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # `rapid.models.llama` decodes these


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family: grouped-query attention, a gated MLP, two norms a layer and one at the end."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a config.json describes.

        Raises:
            ValueError: the architecture is not one of ARCHITECTURES, or the config lacks a number.
        """
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(f"its model_type is {kind}, and this arithmetic is for {', '.join(ARCHITECTURES)}")
        try:
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                vocab_size=config["vocab_size"],
                tied_embeddings=config.get("tie_word_embeddings", False),
                qkv_bias=kind == "qwen2" or config.get("attention_bias", False),
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error

    @property
    def layer_parameters(self) -> int:
        """The parameters of all layers and the last norm."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * 2 * (queries + keys) + self.qkv_bias * (queries + 2 * keys)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The parameters of the output projection; the embedding table is as large."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        return self.layer_parameters + self.head_parameters * (1 if self.tied_embeddings else 2)


@dataclass(frozen=True)
class ServedModel:
    """A shape as an engine holds it, on ``num_devices``. The properties are bytes on each device.

    Each layer is cut over ``num_ranks`` devices that compute together, or the layers are spread over ``num_stages``
    that a pass visits one after another.

    ``weight_bytes`` is the size of one weight of a layer's products. ``number_bytes`` is the size of every other
    number: embeddings, activations, and keys and values unless ``kv_number_bytes`` says otherwise. ``kv_scale_bytes``
    lie beside each key and each value of a head.
    """

    shape: ModelShape
    weight_bytes: float = 2.0
    number_bytes: int = 2
    num_ranks: int = 1
    num_stages: int = 1
    kv_number_bytes: int | None = None
    kv_scale_bytes: int = 0

    @property
    def num_devices(self) -> int:
        return self.num_ranks * self.num_stages

    @property
    def head_weight_bytes(self) -> float:
        """Of one weight of the head, which keeps eight bits when the layers have four."""
        return max(1.0, self.weight_bytes)

    @property
    def bytes_held(self) -> float:
        """All weights. A tied table counts twice when the head is quantised, because the embedding stays as it is."""
        shape = self.shape
        product_bytes = shape.layer_parameters * self.weight_bytes + shape.head_parameters * self.head_weight_bytes
        is_shared = shape.tied_embeddings and self.weight_bytes == self.number_bytes
        return (product_bytes + (0 if is_shared else shape.head_parameters * self.number_bytes)) / self.num_devices

    @property
    def kv_bytes_per_layer(self) -> float:
        """Bytes of a token. A rank has whole KV heads, so more ranks than KV heads save no memory."""
        heads = math.ceil(self.shape.num_kv_heads / self.num_ranks)
        return 2 * heads * (self.shape.head_dim * (self.kv_number_bytes or self.number_bytes) + self.kv_scale_bytes)

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of a token on the device with the most layers."""
        return math.ceil(self.shape.num_layers / self.num_stages) * self.kv_bytes_per_layer

    def sequences_that_fit(self, kv_bytes: float, tokens: int) -> int:
        """The number of sequences of ``tokens`` that fit into ``kv_bytes`` a device."""
        return max(0, int(kv_bytes // (self.kv_bytes_per_token * tokens)))


# From each model's public config.json, by its name without the organisation and "-instruct".
SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 1536, 9, 3, 64, 49_152, tied_embeddings=True),
    "llama-3.2-1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128_256, tied_embeddings=True),
    "llama-3.2-3b": ModelShape(28, 3072, 8192, 24, 8, 128, 128_256, tied_embeddings=True),
    "llama-3.1-8b": ModelShape(32, 4096, 14_336, 32, 8, 128, 128_256),
    "llama-3.1-70b": ModelShape(80, 8192, 28_672, 64, 8, 128, 128_256),
    "llama-3.3-70b": ModelShape(80, 8192, 28_672, 64, 8, 128, 128_256),
    "qwen2.5-7b": ModelShape(28, 3584, 18_944, 28, 4, 128, 152_064, qkv_bias=True),
    "qwen2.5-72b": ModelShape(80, 8192, 29_568, 64, 8, 128, 152_064, qkv_bias=True),
}


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known model; None for any other. The name may have its organisation and "-Instruct"."""
    return SHAPES.get(name.rstrip("/").rpartition("/")[2].lower().removesuffix("-instruct"))
