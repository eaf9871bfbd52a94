"""Free memory of the host and of GPUs, and how much of it an engine takes for keys and values."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of the free memory, for one engine's keys and values, unless the configuration says otherwise.
FREE_MEMORY_SHARE = 0.3
WHOLE_GPU_SHARE = 0.9  # where the engine has the GPU for itself

# PyTorch's allocators say it in words, cuBLAS and cuDNN by the names of their errors.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CU(BLAS|DNN|SOLVER|SPARSE)\w*ALLOC\w*FAILED")


def free_memory(device: torch.device) -> int:
    """Bytes that this process can take now: of a GPU's memory, or of the host's within the limits of this container."""
    if device.type == "cuda":
        import torch  # only here: processes without torch read this module's constant

        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # unlike SC_AVPHYS_PAGES, it counts the page cache's reclaimable memory
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(current.read_text()))
    return max(0, available)


def kv_budget(
    devices: Sequence[torch.device], share: float = FREE_MEMORY_SHARE, taken: Mapping[torch.device, int] | None = None
) -> int:
    """Bytes for the keys and values of layers on these ``devices``; the device with the least room decides.

    They are ``share`` of what is free, less the bytes that will be ``taken`` of each device.
    """
    layers = Counter(devices)
    room = {d: max(0, free_memory(d) - (taken or {}).get(d, 0)) for d in layers}
    return int(min(share * room[d] * len(devices) / layers[d] for d in layers))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there was no memory for what was asked, so that less may work."""
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def take_small_pages(tensor: Tensor) -> None:
    """Makes Linux back the memory of an unwritten CPU tensor with pages of 4 KiB, not of 2 MiB, as it is written.

    This saves memory where writes are scattered: the keys and values of one request lie in as many separate ranges as
    there are layers and heads.
    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_NOHUGEPAGE)


def return_freed_memory() -> None:
    """Returns freed memory to the system, where the C library can do this.

    `rapid` makes glibc keep freed memory for the next pass's activations. After a model is loaded, the kept memory is
    as large as the checkpoint, several times the need of a pass.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
