"""How many bytes of keys and values a loaded model leaves room for on its devices."""

from __future__ import annotations

import logging

import torch

from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.memory import is_out_of_memory, kv_budget
from rapid.kv_cache.table import PageTable
from rapid.models.model import Model

logger = logging.getLogger(__name__)


def measured_kv_budget(model: Model, *, share: float, max_batch_tokens: int, graph_bytes: int) -> int:
    """``share`` of the memory that is free, less what passes of ``max_batch_tokens`` and graphs take on CUDA.

    On a CPU passes take little beside what they leave free, and nothing is measured.
    """
    devices = model.layout.devices
    if model.layout.device.type != "cuda":
        return kv_budget(devices, share)
    taken = largest_pass_bytes(model, max_batch_tokens)
    logger.info("a pass of %d tokens takes %s MiB", max_batch_tokens, [size >> 20 for size in taken.values()])
    taken[model.layout.device] += graph_bytes
    return kv_budget(devices, share, taken)


def largest_pass_bytes(model: Model, num_tokens: int) -> dict[torch.device, int]:
    """The most memory on each CUDA device of a pass over the last ``num_tokens`` of the model's window.

    Where there is no memory for that pass, it is measured with half as many tokens, and so on.
    """
    num_tokens = min(num_tokens, model.info.window)
    while True:
        try:
            return _pass_bytes(model, num_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error) or num_tokens == 1:
                raise
        logger.warning("there is no memory for a pass of %d tokens", num_tokens)
        num_tokens //= 2


@torch.inference_mode()
def _pass_bytes(model: Model, num_tokens: int) -> dict[torch.device, int]:
    devices, window = set(model.layout.devices), model.info.window
    pool = model.new_pool(1)
    # All of the context lies in one page: what it holds does not matter, and a whole window may have no room yet.
    cache = PageTable(pool, [0] * pool.pages_for(window), window - num_tokens)
    torch.cuda.empty_cache()
    before = {device: torch.cuda.memory_reserved(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    model.forward([BatchEntry(cache, [0] * num_tokens, 1)])
    peaks = {device: torch.cuda.max_memory_reserved(device) - before[device] for device in devices}
    torch.cuda.empty_cache()
    return peaks
