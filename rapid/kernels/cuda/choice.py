"""Which attention kernels a device gets: the fastest that compute a small ragged case as SDPA does.

The kernels depend on releases of PyTorch and Triton and on the device. One that fails, or is wrong, is named in a
warning and never used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from rapid.kernels.cuda.attention import (
    FEW_TOKENS,
    FP8,
    PagedAttention,
    PagedBatch,
    PagedKernel,
    gathered_sdpa,
    kernel_name,
    recordable,
    write,
)
from rapid.kernels.cuda.paged_split import SharedPrefix, split_attention
from rapid.kernels.cuda.prefill import varlen_gathered, varlen_paged
from rapid.kernels.interface import BatchEntry
from rapid.kernels.prefix import PrefixGroup
from rapid.kv_cache.pool import KVCache, KVLayout

logger = logging.getLogger(__name__)

# (tokens in the cache, new tokens) of each sequence. Among few are a first token, the largest verification, and
# sequences so long that kernels split them.
FEW = ((300, 1), (0, 2), (1100, FEW_TOKENS), (700, 5), (255, 1))
DECODE = ((300, 1), (0, 1), (1100, 1), (700, 1))
SHARING = ((600, 1), (700, 5), (550, FEW_TOKENS))  # their first two pages are the same
MANY = ((300, 40),)
MANY_FROM_THE_START = ((0, 300),)
_NUM_SHARED = 2
_TOLERANCE = {torch.float32: 1e-3}  # else 16-bit numbers of at most about 4, rounded a few times
_TOLERANCE_16_BIT = 4e-2


@dataclass(frozen=True)
class ByRows:
    """A kernel for batches of few new tokens in each sequence, and another for more."""

    few: PagedKernel
    many: PagedKernel

    @property
    def name(self) -> str:
        return f"{kernel_name(self.few)}, prefill {kernel_name(self.many)}"

    @property
    def recordable(self) -> bool:
        return bool(getattr(self.few, "recordable", False))

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        kernel = self.few if batch.max_new <= FEW_TOKENS else self.many
        return kernel(query, keys, values, batch, scaling)


@recordable
def triton_split(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """`split_attention` of a batch."""
    return split_attention(
        query,
        keys,
        values,
        table=batch.table,
        lengths=batch.lengths,
        starts=batch.starts,
        max_new=batch.max_new,
        scaling=scaling,
        num_sms=_num_sms(query.device),
        prefix=batch.prefix,
    )


@functools.cache
def _num_sms(device: torch.device) -> int:
    """The device's processors. Where there are none, in Triton's interpreter, the number only cuts the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def choose_kernel(layout: KVLayout, num_heads: int) -> PagedKernel:
    """The fastest right kernels for ``num_heads`` query heads over ``layout``, on its first device.

    Devices other than CUDA's get SDPA.
    """
    if layout.device.type != "cuda":
        return gathered_sdpa
    # PyTorch's kernel reads no pages of 8-bit floats.
    paged = () if layout.stored_dtype == FP8 else (varlen_paged,)
    few = first_right((triton_split, *paged), layout, num_heads, (FEW, DECODE, SHARING))
    many = first_right((*paged, varlen_gathered), layout, num_heads, (MANY, MANY_FROM_THE_START))
    chosen = ByRows(few, many)
    logger.info("attention on %s: %s", layout.device, chosen.name)
    return chosen


Case = Sequence[tuple[int, int]]


def first_right(
    candidates: Sequence[PagedKernel], layout: KVLayout, num_heads: int, cases: Sequence[Case]
) -> PagedKernel:
    """The first of ``candidates`` that is right in all ``cases``, or else SDPA, with a warning for each before it."""
    for kernel in candidates:
        faults = (fault(kernel, layout, num_heads, case) for case in cases)
        reason = next((found for found in faults if found is not None), None)
        if reason is None:
            return kernel
        logger.warning("attention kernel %s is not used on %s: %s", kernel_name(kernel), layout.device, reason)
    return gathered_sdpa


@torch.inference_mode()
def fault(kernel: PagedKernel, layout: KVLayout, num_heads: int, case: Case) -> str | None:
    """What is wrong with ``kernel``: an error, or how far it is from SDPA in float32. None if nothing is.

    The pages lie in disorder, and what no sequence wrote holds large numbers, as pages do that others used before. The
    sequences of `SHARING` share their first pages.
    """
    one_layer = replace(layout, devices=(layout.device,))
    backend = PagedAttention(kernel)
    num_pages = [-(-(cached + new) // backend.page_size) for cached, new in case]
    pool = backend.pool(one_layer, sum(num_pages) * backend.page_size * one_layer.bytes_per_token)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(pool.num_pages, generator=generator).split(num_pages)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(layout.device, layout.dtype)

    entries = []
    for pages, (cached, new) in zip(order, case, strict=True):
        if case is SHARING:
            pages[:_NUM_SHARED] = order[0][:_NUM_SHARED]
        cache = KVCache(pool, pages.tolist(), num_shared=0)
        entries.append(BatchEntry(cache, [0] * new, 0))
        unwritten = torch.tensor(cache.slots(cache.capacity))[cached:]
        slots = torch.tensor(cache.slots(cached), dtype=torch.long)
        for rows in (pool.keys[0], pool.values[0]):
            large = torch.full((len(unwritten), *rows.shape[1:]), 100.0, dtype=layout.dtype, device=layout.device)
            write(large, unwritten.to(layout.device), rows)
            write(random(cached, layout.num_kv_heads, layout.head_dim), slots.to(layout.device), rows)
        cache.advance(cached)
    total = sum(new for _, new in case)
    heads = random(total, num_heads + 2 * layout.num_kv_heads, layout.head_dim)
    query = heads[:, :num_heads]
    unturned = torch.ones_like(heads[:, 0]), torch.zeros_like(heads[:, 0])
    scaling = layout.head_dim**-0.5
    try:
        batch = backend.batch(entries)
        if case is SHARING:
            assert isinstance(batch, PagedBatch)
            starts = [0, *accumulate(new for _, new in case)]
            groups = [PrefixGroup(0, len(case), _NUM_SHARED)]
            batch = replace(batch, prefix=SharedPrefix.of(groups, starts, layout.device))
        output = batch.attend(0, heads, unturned, scaling)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)  # an error of the kernel is raised here, not later
    except Exception as error:  # a compiler's errors are of any kind
        return f"{type(error).__name__}: {error}".splitlines()[0]
    pages_of = (-1, pool.page_size, layout.num_kv_heads, layout.head_dim)
    plain = PagedAttention(gathered_sdpa).batch(entries)
    assert isinstance(plain, PagedBatch)
    expected = gathered_sdpa(
        query.float(), pool.keys[0].view(pages_of).float(), pool.values[0].view(pages_of).float(), plain, scaling
    )
    distance = (output.view_as(expected).float() - expected).abs().max().item()
    tolerance = _TOLERANCE.get(layout.dtype, _TOLERANCE_16_BIT)
    # NaN is not below any tolerance.
    return None if distance <= tolerance else f"it is {distance:.2g} from SDPA where {tolerance:.2g} is allowed"
