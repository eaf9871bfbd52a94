"""A weaker copy of a model, where there is no smaller one of its family to be the target of upward speculation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rapid.text.tokenizer import load_tokenizer
from rapid.weights import embedded_models


def weaker_copy(model: str, bits: int) -> Path:
    """The folder of ``model`` with the weights of its layers rounded to ``bits``; it is made once.

    Each output of a layer's product has one scale, so a single large weight makes all others of its row coarse. That is
    what kernels of few bits avoid by groups, and here it is the purpose.
    """
    name = model.rstrip("/").replace("/", "--").lstrip(".-")
    folder = embedded_models.cache_dir() / "weaker" / f"{name}-{bits}bit-rows"
    if folder.exists():
        return folder
    network = AutoModelForCausalLM.from_pretrained(
        embedded_models.resolve(model), dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        for path, weight in network.named_parameters():
            if ".layers." in path and weight.ndim == 2:
                weight.copy_(rounded(weight, bits))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished) / "model"
        network.bfloat16().save_pretrained(made)
        load_tokenizer(model).save_pretrained(made)
        made.rename(folder)
    return folder


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight`` [out, in] with the ``2**bits - 1`` values around 0 that one scale for each output allows."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / most
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)
