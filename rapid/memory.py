"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch

FREE_MEMORY_SHARE = 0.3  # of what is free, for one engine's keys and values, unless it is told


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now: of a GPU's memory, or of the host's within the limits of this container."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # unlike SC_AVPHYS_PAGES, this counts what the page cache would give back
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(current.read_text()))
    return max(0, available)
