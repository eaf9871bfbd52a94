"""Attention of many new tokens (prefill chunks) with PyTorch's varlen kernel, whose parameters differ by release."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cuda.attention import FP8, PagedBatch, gathered


def varlen_paged(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """PyTorch's varlen kernel over the block table itself (torch 2.13).

    Raises:
        NotImplementedError: this PyTorch's kernel takes no block table, or none of pages of 8-bit floats.
    """
    if keys.dtype == FP8:
        raise NotImplementedError("varlen_attn takes no pages of 8-bit floats beside queries of more bits")
    known = _parameters()
    if not {"block_table", "seqused_k", "enable_gqa", "num_splits"} <= known:
        raise NotImplementedError(f"varlen_attn of torch {torch.__version__} takes no block table")
    # FlashAttention 2 wants both cumulative lengths; those of the keys it then replaces by `seqused_k`.
    key_starts = F.pad(batch.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    # Its combination of several splits writes every sequence over the first one. Its decode path, which packs the query
    # heads of a KV head, is for one token without a causal limit; one token needs none.
    return _varlen(
        query,
        keys,
        values,
        batch.starts,
        key_starts,
        batch.max_new,
        batch.table.shape[1] * batch.pool.page_size,
        scale=scaling,
        window_size=(-1, -1) if batch.max_new == 1 else (-1, 0),
        enable_gqa=True,
        seqused_k=batch.lengths,
        block_table=batch.table,
        num_splits=1,
    )


def varlen_gathered(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """PyTorch's varlen kernel over a copy of one sequence's pages, for releases without block tables (torch 2.11).

    Pages of 8-bit floats are converted as they are copied.

    Raises:
        NotImplementedError: this PyTorch has no varlen kernel, or the batch has several sequences.
    """
    if len(batch.table) != 1:
        raise NotImplementedError("the pages of only one sequence are gathered")
    known = _parameters()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    key_rows, value_rows = (
        gathered(pages, batch.table[0].long(), query.dtype).flatten(0, 1) for pages in (keys, values)
    )
    key_starts = F.pad(batch.lengths, (1, 0))
    return _varlen(
        query,
        key_rows,
        value_rows,
        batch.starts,
        key_starts,
        batch.max_new,
        len(key_rows),
        scale=scaling,
        **options,
    )


@functools.cache
def _parameters() -> frozenset[str]:
    """The parameters of this PyTorch's varlen kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotImplementedError(f"torch {torch.__version__} has no varlen_attn") from error
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(*arguments: Any, **options: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(*arguments, **options)
    assert isinstance(output, Tensor)
    return output
