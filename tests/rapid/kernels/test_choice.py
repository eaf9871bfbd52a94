"""A wrong or failing attention kernel is never chosen, and says why; few and many new tokens get their own kernels."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from running import attended
from torch import Tensor

from rapid.kernels.cuda import prefill
from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa
from rapid.kernels.cuda.choice import DECODE, FEW, MANY, SHARING, ByRows, choose_kernel, fault, first_right
from rapid.kernels.cuda.prefill import varlen_gathered, varlen_paged
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVLayout

LAYOUT = KVLayout(2, 16, torch.float32, devices=(torch.device("cpu"),))
HEADS = 6


def over_the_first(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """As PyTorch 2.13's combination of splits: what belongs to the last sequence comes out wrong."""
    output = gathered_sdpa(query, keys, values, batch, scaling)
    output[batch.starts[-2] :] = 0
    return output


def not_a_number(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    return torch.full_like(query, torch.nan)


def failing(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    raise RuntimeError("no kernel image\nand more")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(over_the_first, "from SDPA"), (not_a_number, "nan from SDPA"), (failing, "RuntimeError: no kernel image")],
)
def test_what_is_wrong_or_fails_is_named_and_not_used(
    kernel: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert first_right([kernel], LAYOUT, HEADS, [FEW]) is gathered_sdpa
    assert kernel.__name__ in caplog.text and reason in caplog.text


@pytest.mark.parametrize("case", [FEW, DECODE, MANY, SHARING])
def test_what_is_right_has_no_fault(case: Any) -> None:
    assert fault(gathered_sdpa, LAYOUT, HEADS, case) is None


def test_a_kernel_that_gets_shared_pages_wrong_is_not_used() -> None:
    """The probe's sequences do share pages, and the kernel is told which."""

    def without_the_shared(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        if batch.prefix is None:
            return gathered_sdpa(query, keys, values, batch, scaling)
        assert batch.prefix.skipped.tolist() == [2, 2, 2] and batch.prefix.pages.tolist() == [2, 0, 0]
        assert batch.table[:, :2].unique(dim=0).shape == (1, 2)
        rest = replace(batch, table=batch.table[:, 2:], lengths=batch.lengths - 2 * 256)
        return gathered_sdpa(query, keys, values, rest, scaling)

    assert fault(without_the_shared, LAYOUT, HEADS, FEW) is None
    assert "from SDPA" in (fault(without_the_shared, LAYOUT, HEADS, SHARING) or "")


def test_devices_without_cuda_get_sdpa() -> None:
    assert choose_kernel(LAYOUT, HEADS) is gathered_sdpa


def test_each_sequence_of_many_new_tokens_is_by_itself_and_the_others_are_together() -> None:
    seen: list[tuple[str, list[int]]] = []

    def few(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        seen.append(("few", batch.lengths.tolist()))
        return gathered_sdpa(query, keys, values, batch, scaling)

    def many(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        seen.append(("many", batch.lengths.tolist()))
        return gathered_sdpa(query, keys, values, batch, scaling)

    case = ((5, 40), (20, 1), (0, 18), (3, 17))
    assert fault(ByRows(few, many), LAYOUT, HEADS, case) is None
    assert seen == [("many", [45]), ("many", [18]), ("few", [21, 20])]


# PyTorch's varlen kernel, of two releases


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the varlen kernel is called with; the answer is empty."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def call(*arguments: Any, **options: Any) -> Tensor:
        made.append((arguments, options))
        return torch.zeros_like(arguments[0])

    monkeypatch.setattr(prefill, "_varlen", call)
    return made


def attend(kernel: Any, num_new: int, sequences: int = 1) -> None:
    backend = PagedAttention(kernel)
    pool = backend.pool(LAYOUT, 4 * 256 * LAYOUT.bytes_per_token)
    caches = [pool.open([], 300) for _ in range(sequences)]
    batch = backend.batch([BatchEntry(cache, [0] * num_new, 0) for cache in caches if cache is not None])
    query = torch.zeros(sequences * num_new, HEADS, 16)
    attended(batch, query, query[:, :2], query[:, :2], 0.25)


def test_a_block_table_goes_with_both_cumulative_lengths_and_without_splits(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = frozenset({"block_table", "seqused_k", "enable_gqa", "num_splits"})
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert wanted <= prefill._parameters()
    monkeypatch.setattr(prefill, "_parameters", lambda: wanted)
    attend(varlen_paged, 17, sequences=2)
    attend(varlen_paged, 1)
    (arguments, options), (_, of_one) = calls
    assert arguments[3].tolist() == arguments[4].tolist() == [0, 17, 34]
    assert (options["num_splits"], options["window_size"]) == (1, (-1, 0))
    assert of_one["window_size"] == (-1, -1)  # which lets it pack the heads of a group


def test_without_block_tables_one_sequences_pages_are_copied_side_by_side(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_parameters", lambda: frozenset({"scale", "is_causal"}))
    attend(varlen_gathered, 280)
    ((_, keys, _, starts, key_starts, max_q, max_k), options) = calls[0]
    assert (tuple(keys.shape), max_q, max_k) == ((512, 2, 16), 280, 512)
    assert starts.tolist() == key_starts.tolist() == [0, 280]
    assert options == {"scale": 0.25, "is_causal": True}
    with pytest.raises(NotImplementedError, match="only one"):
        attend(varlen_gathered, 2, sequences=2)
    with pytest.raises(NotImplementedError, match="no block table"):
        attend(varlen_paged, 2)
