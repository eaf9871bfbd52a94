"""Cases of attention over pages for few new tokens, and how far a kernel's answer is from float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.cuda.paged_split import SharedPrefix, split_attention
from rapid.kernels.prefix import PrefixGroup


@dataclass(frozen=True)
class Case:
    """Sequences with (cached, new) tokens each, over pages in disorder whose unwritten slots hold NaN.

    With ``groups``, (first, end, pages) of all sequences, neighbours share their first pages, and these are read once.
    With ``chosen``, each sequence reads only pages of these numbers. ``fp8``: keys and values are stored in
    float8_e4m3fn with a scale for each KV head. ``num_sms`` decides into how many parts the sequences are split.
    """

    shapes: Sequence[tuple[int, int]]
    kv_heads: int = 2
    group: int = 4
    d: int = 16
    dtype: torch.dtype = torch.float32
    page_size: int = 16
    sinks: int = 0
    window: int | None = None
    chosen: Sequence[Sequence[int]] | None = None
    groups: Sequence[tuple[int, int, int]] | None = None
    fp8: bool = False
    num_sms: int = 8
    seed: int = 0


class Stored(NamedTuple):
    """``pages`` [pages, page size, KV heads, d] in the case's type, and the same numbers by sequence in float64."""

    pages: Tensor
    scales: Tensor | None
    rows: list[Tensor]  # of each sequence, [tokens, KV heads, d]


def error(case: Case, device: str = "cpu") -> float:
    """The largest distance of `split_attention` from attention in float64; NaN if a number of the answer is NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [cached + new for cached, new in case.shapes]
    num_pages = [-(-length // case.page_size) for length in lengths]
    own = torch.randperm(sum(num_pages), generator=generator).split(num_pages)
    for first, end, shared in case.groups or ():
        for pages in own[first + 1 : end]:
            pages[:shared] = own[first][:shared]
    keys, values = _store(case, own, lengths, generator), _store(case, own, lengths, generator)
    new = [n for _, n in case.shapes]
    query = torch.randn(sum(new), case.kv_heads * case.group, case.d, generator=generator).to(case.dtype)
    listed = case.chosen or [range(n) for n in num_pages]
    table = torch.full((len(new), max(map(len, listed))), sum(num_pages), dtype=torch.int32)
    positions = torch.zeros_like(table)
    for row, at, pages, numbers in zip(table, positions, own, listed, strict=True):
        row[: len(numbers)] = pages[list(numbers)].int()
        at[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int32)
    used = torch.tensor([len(numbers) for numbers in listed], dtype=torch.int32)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    prefix = None
    if case.groups:
        groups = [PrefixGroup(*group) for group in case.groups]
        prefix = SharedPrefix.of(groups, starts.tolist(), torch.device(device))
    output = split_attention(
        query.to(device),
        keys.pages.to(device),
        values.pages.to(device),
        table=table.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        starts=starts.to(device),
        max_new=max(new),
        scaling=case.d**-0.5,
        num_sms=case.num_sms,
        sinks=case.sinks,
        window=case.window,
        page_positions=positions.to(device) if case.chosen else None,
        pages_used=used.to(device) if case.chosen else None,
        key_scales=None if keys.scales is None else keys.scales.to(device),
        value_scales=None if values.scales is None else values.scales.to(device),
        prefix=prefix,
    )
    expected = [
        plain(part, k, v, case, case.chosen[i] if case.chosen else None)
        for i, (part, k, v) in enumerate(zip(query.split(new), keys.rows, values.rows, strict=True))
    ]
    return (output.cpu().double() - torch.cat(expected)).abs().max().item()


def plain(query: Tensor, keys: Tensor, values: Tensor, case: Case, chosen: Sequence[int] | None) -> Tensor:
    """Attention of one sequence's last tokens in float64, from the definition: [new, heads, d]."""
    new, length = len(query), len(keys)
    position = torch.arange(length - new, length)[:, None]
    of_key = torch.arange(length)
    seen = of_key <= position
    if case.window is not None:
        seen = seen & ((of_key < case.sinks) | (of_key > position - case.window))
    if chosen is not None:
        seen = seen & torch.isin(of_key // case.page_size, torch.tensor(list(chosen)))
    heads = query.double().unflatten(1, (case.kv_heads, case.group))
    scores = torch.einsum("nhgd,lhd->hgnl", heads, keys) * case.d**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # a token that sees nothing gets zeros
    return torch.einsum("hgnl,lhd->nhgd", weights, values).flatten(1, 2)


def _store(case: Case, own: Sequence[Tensor], lengths: Sequence[int], generator: torch.Generator) -> Stored:
    num_pages = sum(map(len, own)) + 1  # with a page that is nobody's
    rows = [torch.randn(length, case.kv_heads, case.d, generator=generator) for length in lengths]
    for first, end, shared in case.groups or ():
        for part in rows[first + 1 : end]:
            part[: shared * case.page_size] = rows[first][: shared * case.page_size]
    scales = torch.rand(case.kv_heads, generator=generator) + 0.5 if case.fp8 else None
    dtype = torch.float8_e4m3fn if case.fp8 else case.dtype
    factor = torch.ones(case.kv_heads) if scales is None else scales
    stored = [(part / factor[:, None]).to(dtype) for part in rows]
    pages = torch.full((num_pages, case.page_size, case.kv_heads, case.d), torch.nan).to(dtype)
    flat = pages.view(torch.uint8).flatten(0, 1) if case.fp8 else pages.flatten(0, 1)
    for numbers, part in zip(own, stored, strict=True):
        at = torch.arange(len(part))
        slots = numbers[at // case.page_size] * case.page_size + at % case.page_size
        flat[slots] = part.view(torch.uint8) if case.fp8 else part
    return Stored(pages, scales, [part.double() * factor.double()[:, None] for part in stored])
