"""Which module computes which architecture.

A module of an architecture has a class `Decoder` with the interface of `rapid.models.llama.Decoder`. Architectures that
differ only by a flag of their configuration share one module. A module is imported when one of its models is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rapid.errors import ModelFileError

if TYPE_CHECKING:
    from rapid.models.llama import Decoder

# transformers' `model_type` → module.
ARCHITECTURES = {
    "llama": "rapid.models.llama",
    "mistral": "rapid.models.llama",
    "qwen2": "rapid.models.llama",
    "qwen3": "rapid.models.llama",
}


def decoder_class(model_type: str) -> type[Decoder]:
    """The class that computes models of transformers' ``model_type``.

    Raises:
        ModelFileError: the architecture is not supported.
    """
    if model_type not in ARCHITECTURES:
        raise ModelFileError(f"only {', '.join(ARCHITECTURES)} are supported, found {model_type}")
    decoder: type[Decoder] = import_module(ARCHITECTURES[model_type]).Decoder
    return decoder
