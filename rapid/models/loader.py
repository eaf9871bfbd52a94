"""Loads a model from its name, a folder or a hub id to weights on their devices, alone or as one of several ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from rapid.errors import ModelFileError
from rapid.kv_cache.memory import return_freed_memory
from rapid.models.device_map import spread
from rapid.models.info import RankPlacement
from rapid.models.model import Model
from rapid.models.tensor_parallel import Group, together
from rapid.text.tokenizer import load_tokenizer
from rapid.weights import embedded_models


def load_model(
    ref: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    quantization: str = "none",
    kv_dtype: str = "auto",
    placement: RankPlacement | None = None,
) -> Model:
    """Loads an embedded model by name, a local folder, or a Hugging Face hub id.

    With ``device_map`` "auto" the layers are spread over all GPUs of this process. With a ``placement`` this process
    first meets the other ranks, and then loads only its own share of the weights.

    Raises:
        ModelFileError: the files are missing or unreadable, the architecture is not supported, or there is no room.
        EngineLost: the other ranks did not come in time, or one is gone.
    """
    device = default_device() if device == "auto" else device
    # Quantised products, and 8-bit pages, on a CPU need bfloat16 rows, even if dense products are faster in float32.
    few_bits = (quantization != "none" or kv_dtype == "int8") and device == "cpu"
    automatic = torch.bfloat16 if few_bits else default_dtype(device)
    torch_dtype = automatic if dtype == "auto" else cast(torch.dtype, getattr(torch, dtype))
    tokenizer = load_tokenizer(ref)
    group = Group(placement, device) if placement is not None else None
    try:
        files = embedded_models.resolve(ref)
        where: dict[str, Any] = {"device_map": device}
        if group is not None:
            where = {"distributed_config": group.plan()}
        elif device_map == "auto":
            where = {"device_map": spread(files, torch_dtype)}
        network = AutoModelForCausalLM.from_pretrained(files, dtype=torch_dtype, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"the model {ref!r} could not be loaded: {error}") from error
    model = Model(network, tokenizer, ref, quantization=quantization, kv_dtype=kv_dtype, group=group)
    del network  # its weights are repacked
    if group is not None:
        with together(ref):
            group.wait()  # disks differ in speed, and a pass has a deadline that loading has not
    return_freed_memory()
    if group is None or group.placement.rank == 0:
        model.warm_up()
    return model


def default_device() -> str:
    """The first CUDA device when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
