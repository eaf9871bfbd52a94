"""Which device holds which layers, if one model is spread over several GPUs of one process.

accelerate decides this before any weight is read: about as many bytes for each GPU, and no layer is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory
from transformers import AutoConfig, AutoModelForCausalLM

from rapid.errors import ModelFileError
from rapid.kv_cache.memory import free_memory

_WEIGHTS_SHARE = 0.9  # of the free memory; the rest is for keys, values and activations


def spread(files: str, dtype: torch.dtype, room: Mapping[int | str, int] | None = None) -> dict[str, int | str]:
    """The device of each part of the model in ``files`` (a folder or hub id), for transformers' `from_pretrained`.

    ``room`` is the bytes for weights by device. By default it is most of the free memory of all GPUs, or of the host if
    there is no GPU.

    Raises:
        ModelFileError: the weights do not fit. Beside GPUs no weights are left on the host or on disk: every decode
            step would have to read them from there.
    """
    room = room or _free()
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(files, trust_remote_code=False)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    network.tie_weights()
    whole = network._no_split_modules
    balanced = get_balanced_memory(network, max_memory=dict(room), no_split_module_classes=whole)
    devices: dict[str, int | str] = infer_auto_device_map(network, max_memory=balanced, no_split_module_classes=whole)
    sizes = compute_module_sizes(network)
    missing = sum(sizes[part] for part, device in devices.items() if device == "disk")
    if missing:
        where = f"{len(room)} GPUs" if "cpu" not in room else "the host"
        raise ModelFileError(
            f"{files}: {missing / 1e9:.2f} GB of {sizes[''] / 1e9:.2f} GB of weights find no room on {where}, with "
            f"{sum(room.values()) / 1e9:.2f} GB to use: take more GPUs (num_gpus), or a smaller model"
        )
    return devices


def _free() -> dict[int | str, int]:
    gpus = range(torch.cuda.device_count())
    room: dict[int | str, int] = {i: int(_WEIGHTS_SHARE * free_memory(torch.device("cuda", i))) for i in gpus}
    return room or {"cpu": int(_WEIGHTS_SHARE * free_memory(torch.device("cpu")))}
