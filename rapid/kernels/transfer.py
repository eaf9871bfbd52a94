"""Between the host and the device: uploads, for which the host does not wait, and the download, for which it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Whether the device works on while the host does other things, so that reading a result means waiting for it."""
    return device.type != "cpu"


def upload(data: ArrayLike, dtype: DTypeLike, device: torch.device) -> Tensor:
    """``data`` as a tensor on ``device``. The host may change or forget ``data`` at once.

    A blocking copy would wait for all work that the device has been given before. An asynchronous copy from pageable
    memory does not: CUDA stages the data before it returns.
    """
    return torch.from_numpy(np.array(data, dtype)).to(device, non_blocking=True)


def download(values: Tensor) -> NDArray[Any]:
    """``values`` on the host. The only place where an engine waits for its device between two passes."""
    array: NDArray[Any] = values.cpu().numpy()
    return array
