"""How many kernels a decode pass of Llama-3.1-8B's shape launches on CUDA, with fused kernels and without.

The pass runs on PyTorch's meta device, where tensors have shapes and no values. Every operator that is no view counts
as a launch, and so does every Triton kernel. CUDA has RMS norm as one kernel, so it counts as one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common.results import write
from benchmarks.gpu_check.models import REAL
from rapid.kernels.cuda import attention, fused, fused_kernels, low_bit, low_bit_kernels, split_kernels
from rapid.kernels.cuda.attention import PAGE_SIZE, PagedAttention, PagedBatch, Writer
from rapid.kernels.cuda.choice import triton_split
from rapid.kernels.rows import UNFUSED, RowOperations
from rapid.kv_cache.pool import KVLayout
from rapid.models import llama
from rapid.models.llama import Decoder

META = torch.device("meta")
NUM_SMS = 132  # an H100's
_KERNELS = {
    split_kernels: ("attend_part", "combine_parts"),
    low_bit_kernels: ("multiply", "add_parts", "unpack"),
    fused_kernels: ("add_norm_row", "gate_row", "rotate_and_write_heads"),
}


class Launches(TorchDispatchMode):
    """Counts launches by name while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            self.by_name[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class _Kernel:
    """In the place of a Triton kernel: it only counts."""

    def __init__(self, name: str, launches: Launches) -> None:
        self._name, self._launches = name, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_: Any, **__: Any) -> None:
            self._launches.by_name[self._name] += 1

        return launch


@contextmanager
def counted() -> Iterator[Launches]:
    """What is launched within."""
    launches = Launches()

    def norm(x: Tensor, size: Any, weight: Tensor, eps: float) -> Tensor:
        launches.by_name["rms_norm"] += 1
        with _disable_current_modes():
            return torch.empty_like(x)

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(F, "rms_norm", norm))
        for module, names in _KERNELS.items():
            for name in names:
                patched.enter_context(mock.patch.object(module, name, _Kernel(name, launches)))
        patched.enter_context(launches)
        yield launches


def decoder(rows: RowOperations, quantization: str, shape: dict[str, Any]) -> Decoder:
    """A decoder on the meta device as CUDA would have it."""
    with META:
        network = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    with (
        mock.patch.object(llama, "choose_rows", lambda *_: rows),
        mock.patch.object(low_bit, "_fault", lambda *_: None),
        mock.patch.object(low_bit, "_num_sms", lambda _: NUM_SMS),
    ):
        return Decoder(network, quantization)


def decode_pass(made: Decoder, writer: Writer, num_sequences: int, context: int) -> Counter[str]:
    """What a decode pass launches: the layers and the head, without sampling."""
    layout = KVLayout(made.num_kv_heads, made.head_dim, torch.bfloat16, made.devices)
    with mock.patch("rapid.kv_cache.pool.take_small_pages", lambda rows: None):
        pool = PagedAttention(triton_split).pool(layout, 2**30)
    width = -(-context // PAGE_SIZE)
    places = torch.empty(num_sequences, dtype=torch.long, device=META)
    batch = PagedBatch(
        pool=pool,
        slots=places,
        table=torch.empty(num_sequences, width, dtype=torch.int32, device=META),
        lengths=torch.empty(num_sequences, dtype=torch.int32, device=META),
        starts=torch.empty(num_sequences + 1, dtype=torch.int32, device=META),
        max_new=1,
        kernel=triton_split,
        writer=writer,
    )
    with torch.no_grad(), mock.patch("rapid.kernels.cuda.choice._num_sms", lambda _: NUM_SMS), counted() as seen:
        made(places, places, batch, places)
    return seen.by_name


SIDES = {"operators": (UNFUSED, attention.rotate_and_write), "fused": (fused.FUSED, fused.triton_rotate_and_write)}


def measured(shape: dict[str, Any], num_sequences: int = 1, context: int = 8192) -> dict[str, Any]:
    found = {}
    for quantization in ("none", "int4"):
        for side, (rows, writer) in SIDES.items():
            by_name = decode_pass(decoder(rows, quantization, shape), writer, num_sequences, context)
            found[f"{quantization}, {side}"] = {"launches": by_name.total(), **dict(by_name.most_common())}
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write("launches", {"layers": REAL.shape["num_hidden_layers"], "decode_pass": measured(REAL.shape)})


if __name__ == "__main__":
    main()
