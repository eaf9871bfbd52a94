"""The device, its attention kernels, its products, and replayed graphs: what lies below the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.models import Sizes, counting_model, median_ms, synchronize
from benchmarks.gpu_check.progress import Progress, Result
from rapid.errors import ModelFileError
from rapid.kernels.cuda.attention import FEW_TOKENS, PagedAttention, Writer, groups_worth_sharing, rotate_and_write
from rapid.kernels.cuda.choice import choose_kernel
from rapid.kernels.cuda.fused import choose_rows, choose_writer
from rapid.kernels.interface import BatchEntry
from rapid.kernels.linear import check_scheme, make_linear
from rapid.kernels.rows import UNFUSED, RowOperations
from rapid.kv_cache.pool import KVCache, KVLayout, KVPool
from rapid.kv_cache.table import PageTable
from rapid.models.info import GraphLimits
from rapid.models.model import Model

WEIGHT_BYTES = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5625}  # a weight of the layers, by scheme
_ROWS = (1, 5, 16, 64, 2048)


def peaks(progress: Progress, sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Bytes a millisecond of a copy, and operations a millisecond of a bfloat16 matrix product, as measured."""
    real = device.type == "cuda"

    def copy() -> Result:
        source = torch.empty(2**30 if real else 2**24, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return {"tb_per_s": 2 * source.nbytes / median_ms(lambda: target.copy_(source), device, 11) / 1e9}

    def product() -> Result:
        n = 8192 if real else 256
        matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        return {"tflops": 2 * n**3 / median_ms(lambda: matrix @ matrix, device, 11) / 1e9}

    moved, computed = progress.measure("copy", copy), progress.measure("bf16 product", product)
    return moved["tb_per_s"] * 1e9, computed["tflops"] * 1e9


def attention(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """Each case of (sequences × new tokens × context) against float64, with what it read a second."""
    heads, kv_heads = sizes.shape["num_attention_heads"], sizes.shape["num_key_value_heads"]
    head_dim = sizes.shape["hidden_size"] // heads
    layout = KVLayout(kv_heads, head_dim, torch.bfloat16, (device,))
    backend = PagedAttention(choose_kernel(layout, heads))
    progress.measure("kernels", lambda: {"chosen": backend.name})
    for context in (sizes.contexts[0], sizes.contexts[-1]):
        for num_sequences in (1, 2, 4, *sizes.batches[1:]):
            for new in (1, 5, FEW_TOKENS, 0):  # 0: ragged, 1 to 17
                counts = [new or 1 + (7 * i) % FEW_TOKENS for i in range(num_sequences)]
                name = f"{num_sequences} × {new or 'ragged'} at {context}"
                progress.measure(name, lambda n=counts, c=context: _attended(backend, layout, heads, c, n))


def _attended(backend: PagedAttention, layout: KVLayout, heads: int, context: int, counts: list[int]) -> Result:
    device = layout.device
    pool = backend.pool(layout, len(counts) * (context + 2 * backend.page_size) * layout.bytes_per_token)
    order = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    for rows in (*pool.keys, *pool.values):
        rows.fill_(torch.nan)  # what no sequence wrote must not matter
    entries = []
    for i, new in enumerate(counts):
        length = context - 37 * i if context > 37 * len(counts) else context  # no two of one length
        pages = [order.pop() for _ in range(pool.pages_for(length + new))]
        cache = KVCache(pool, pages, num_shared=0)
        slots = torch.tensor(cache.slots(length), device=device)
        for rows in (*pool.keys, *pool.values):
            rows[slots] = torch.randn(length, *rows.shape[1:], device=device, dtype=rows.dtype)
        cache.advance(length)
        entries.append(BatchEntry(cache, [0] * new, 0))
    new = (sum(counts), heads + 2 * layout.num_kv_heads, layout.head_dim)
    projected = torch.randn(new, device=device, dtype=layout.dtype)
    query = projected[:, :heads]
    unturned = torch.ones_like(projected[:, 0]), torch.zeros_like(projected[:, 0])
    batch, scaling = backend.batch(entries), layout.head_dim**-0.5
    output = batch.attend(0, projected, unturned, scaling).view_as(query)
    error = max(
        (output[rows] - expected).abs().max().item() for rows, expected in _in_float64(pool, entries, query, scaling)
    )
    ms = median_ms(lambda: batch.attend(0, projected, unturned, scaling), device, 15)
    read = sum(cache.length + len(tokens) for cache, tokens, _ in entries) * layout.bytes_per_token
    return {"max_error": error, "ms": ms, "tb_per_s": read / ms / 1e9}


def _in_float64(
    pool: KVPool, entries: list[BatchEntry], query: Tensor, scaling: float
) -> Iterator[tuple[slice, Tensor]]:
    """For each sequence its rows of the output, computed plainly, one KV head at a time."""
    start = 0
    for cache, tokens, _ in entries:
        new, length = len(tokens), cache.length + len(tokens)
        slots = torch.tensor([p * pool.page_size + i for p in cache.pages for i in range(pool.page_size)][:length])
        keys, values = (rows[0][slots.to(query.device)].double() for rows in (pool.keys, pool.values))
        group = query.shape[1] // keys.shape[1]
        seen = (
            torch.arange(length, device=query.device) <= cache.length + torch.arange(new, device=query.device)[:, None]
        )
        rows = slice(start, start + new)
        parts = []
        for head in range(query.shape[1]):
            scores = query[rows, head].double() @ keys[:, head // group].T * scaling
            parts.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[:, head // group])
        yield rows, torch.stack(parts, 1)
        start += new


def schemes(progress: Progress, device: torch.device) -> list[str]:
    """The schemes of quantisation that the device has; the others are left out by name."""
    here = []
    for scheme in WEIGHT_BYTES:
        try:
            check_scheme(scheme, device, torch.bfloat16)
            here.append(scheme)
        except ModelFileError as error:
            progress.measure(f"scheme {scheme}", lambda why=error.message: {"left_out": why})
    return here


def products(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """The MLP's largest product under each scheme: its error against float64, and what it read a second."""
    hidden, wide = sizes.shape["hidden_size"], 2 * sizes.shape["intermediate_size"]
    for scheme in schemes(progress, device):
        for num_rows in _ROWS:
            progress.measure(
                f"{scheme}, {num_rows} rows", lambda s=scheme, n=num_rows: _product(hidden, wide, s, n, device)
            )


def _product(hidden: int, wide: int, scheme: str, num_rows: int, device: torch.device) -> Result:
    torch.manual_seed(0)
    # Several copies, more than a cache holds, so that each product reads its weight from memory.
    copies = 4 if device.type == "cuda" else 1
    weights = [torch.randn(wide, hidden, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    rows = torch.randn(num_rows, hidden, device=device, dtype=torch.bfloat16)
    exact = rows[:4].double() @ weights[0].double().T
    linears = [make_linear(weight, None, scheme) for weight in weights]
    error = (linears[0](rows)[:4].double() - exact).norm() / exact.norm()
    ms = median_ms(lambda: [linear(rows) for linear in linears], device, 15) / copies
    num_bytes = WEIGHT_BYTES[scheme] * hidden * wide
    return {"relative_error": error.item(), "ms": ms, "weights_tb_per_s": num_bytes / ms / 1e9}


def fused(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """A layer's operations between its products: those chosen at load against float64 and PyTorch's operators."""
    heads, kv_heads = sizes.shape["num_attention_heads"], sizes.shape["num_key_value_heads"]
    hidden, intermediate = sizes.shape["hidden_size"], sizes.shape["intermediate_size"]
    layout = KVLayout(kv_heads, hidden // heads, torch.bfloat16, (device,))
    rows, writer = choose_rows(device, torch.bfloat16, hidden, intermediate), choose_writer(layout, heads)
    names = {"norm and gate": rows is not UNFUSED, "rotation": writer is not rotate_and_write}
    progress.measure("kernels", lambda: {name: "fused" if chosen else "PyTorch's" for name, chosen in names.items()})
    for num_rows in (1, 16, 2048):
        progress.measure(f"{num_rows} rows", lambda n=num_rows: _fused(rows, writer, layout, heads, sizes, n))


def _fused(rows: RowOperations, writer: Writer, layout: KVLayout, heads: int, sizes: Sizes, num_rows: int) -> Result:
    """Errors of the largest number, and milliseconds beside those of PyTorch's operators."""
    device, d, kv_heads = layout.device, layout.head_dim, layout.num_kv_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=layout.dtype)

    hidden, wide = sizes.shape["hidden_size"], 2 * sizes.shape["intermediate_size"]
    x, more, weight, gates = random(num_rows, hidden), random(num_rows, hidden), random(hidden), random(num_rows, wide)
    projected, angles = random(num_rows, heads + 2 * kv_heads, d), random(num_rows, d)
    rotation, slots = (angles.cos(), angles.sin()), torch.randperm(num_rows, device=device)

    def each(rows: RowOperations, writer: Writer, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
        """The three operations on numbers of ``dtype``."""
        given, angled = projected.to(dtype), (rotation[0].to(dtype), rotation[1].to(dtype))
        keys, values = (torch.zeros(num_rows, kv_heads, d, device=device, dtype=dtype) for _ in range(2))
        one, other, scale, gated = x.to(dtype), more.to(dtype), weight.to(dtype), gates.to(dtype)
        return [
            lambda: rows.add_norm(one, other, scale, 1e-5)[1],
            lambda: rows.gate(gated.clone()),  # PyTorch's writes over it
            lambda: torch.cat((writer(given.clone(), angled, slots, keys, values), keys[slots], values[slots]), 1),
        ]

    result: Result = {}
    chosen, plain = each(rows, writer, layout.dtype), each(UNFUSED, rotate_and_write, layout.dtype)
    exact = each(UNFUSED, rotate_and_write, torch.float64)
    for name, ours, theirs, expected in zip(("norm", "gate", "rotation"), chosen, plain, exact, strict=True):
        right = expected()
        result[f"{name}_error"] = ((ours().double() - right).abs().max() / right.abs().max()).item()
        result[f"{name}_ms"] = median_ms(ours, device, 15)
        result[f"{name}_by_operators_ms"] = median_ms(theirs, device, 15)
    return result


def graphs(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """Replayed passes against eager ones, a hundred times with other tables, while another thread allocates."""
    model = counting_model(replace(sizes, shape=sizes.shape | {"num_hidden_layers": 2}), device)
    progress.measure("replay equals eager", lambda: _replays(model, device))


def _replays(model: Model, device: torch.device) -> Result:
    pool = model.new_pool(64 * 1024 * model.layout.bytes_per_token)
    for rows in (*pool.keys, *pool.values):
        rows.normal_()
    started = time.perf_counter()
    recorded = model.record(pool, GraphLimits())
    record_s = time.perf_counter() - started
    stop = threading.Event()
    beside = threading.Thread(target=_allocate, args=(device, stop), daemon=True)
    beside.start()
    worst, chance = 0.0, torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=chance))

    document, sharing = pool.open([0], 1500), 0
    assert document is not None
    try:
        for i in range(100):
            opened = []
            entries = []
            for _ in range(draw(1, 9)):
                length, new = draw(1, 1500), draw(1, FEW_TOKENS + 1)
                own = pool.open([0], length + new)
                assert own is not None
                opened.append(own)
                first = length // pool.page_size if i % 2 else 0  # every other pass is over one document
                cache = PageTable(pool, document.pages[:first] + own.pages[first:], length)
                entries.append(BatchEntry(cache, [draw(0, model.vocab_size) for _ in range(new)], new))
            entries.sort(key=lambda entry: entry.cache.pages)
            sharing += bool(groups_worth_sharing(entries))
            eager = model.compute(entries)[:, : model.vocab_size].float()
            replayed = torch.cat(model.forward(entries))
            worst = max(worst, (eager - replayed).abs().max().item())
            for own in opened:
                pool.close(own)
    finally:
        stop.set()
        beside.join()
    num_graphs = 0 if recorded is None else len(recorded.shapes)
    return {
        "passes": 100,
        "sharing": sharing,
        "max_difference": worst,
        "graphs": num_graphs,
        "record_s": record_s,
    }


def _allocate(device: torch.device, stop: threading.Event) -> None:
    held: list[Any] = []
    while not stop.is_set():
        held = [torch.empty(1 << 20, device=device), *held[:7]]
        synchronize(device)
