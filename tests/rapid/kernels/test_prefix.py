"""Sequences that share pages get what each would get alone, and their shared pages are read once."""

from collections.abc import Callable
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gate import Gate
from running import VOCAB, attended, done, opened, random_tokens, verification
from test_attention import TOLERANCES, plain_attention
from torch import Tensor

from rapid.engine.engine import Engine
from rapid.engine.scheduler import schedule
from rapid.kernels.cpu.attention import RunAttention, RunBatch
from rapid.kernels.cpu.attention_ir import BLOCK
from rapid.kernels.interface import BatchEntry
from rapid.kernels.prefix import PrefixGroup, prefix_groups
from rapid.kv_cache.pool import KVLayout, KVPool
from rapid.kv_cache.table import PageTable
from rapid.models.model import Model
from rapid.speculation.draft import Draft, certain_draft

HEADS, KV_HEADS, LAYER = 6, 2, 0
each_dtype = pytest.mark.parametrize(
    ("d", "dtype"),
    [
        pytest.param(16, torch.float32, id="float32"),
        pytest.param(16, torch.bfloat16, id="bfloat16"),
        pytest.param(64, torch.bfloat16, id="compiled"),
    ],
)

# Groups of sequences: how many positions its members share, and each member's (own cached, new) tokens.
Group = tuple[int, list[tuple[int, int]]]
CASES: dict[str, list[Group]] = {
    "two": [(600, [(40, 1), (0, 1)])],
    "eight, ragged": [(512, [(n * 70, 1 + n * 2) for n in range(8)])],
    "long drafts": [(300, [(10, 17), (500, 33), (0, 20)])],
    "many new tokens beside few": [(530, [(9, 70), (3, 1), (30, 5), (4, 40)])],
    "alone beside groups": [(0, [(300, 3)]), (900, [(5, 2), (7, 1), (0, 9)]), (0, [(0, 8)]), (256, [(1, 1), (1, 1)])],
    "too little to share": [(255, [(40, 2), (90, 3)])],
}


def batch_of(groups: list[Group], dtype: torch.dtype, d: int) -> tuple[list[BatchEntry], Tensor, Tensor]:
    """Entries over scattered pages, the query [T, heads, d], and what attention in float64 gives.

    What no sequence wrote is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    layout = KVLayout(KV_HEADS, d, dtype, devices=(torch.device("cpu"),))
    pool = KVPool(layout, 2**25)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(torch.nan)
    free = torch.randperm(pool.num_pages, generator=generator).tolist()

    def write(pages: list[int], first: int, end: int) -> None:
        slots = [pages[i // 16] * 16 + i % 16 for i in range(first, end)]
        for rows in (pool.keys[LAYER], pool.values[LAYER]):
            rows[:, slots] = torch.randn(KV_HEADS, len(slots), d, generator=generator).to(dtype)

    entries, queries, expected = [], [], []
    for shared, members in groups:
        shared_pages = [free.pop() for _ in range(shared // 16)]
        write(shared_pages, 0, shared // 16 * 16)
        for own, new in members:
            cached = shared // 16 * 16 + own
            pages = shared_pages + [free.pop() for _ in range(-(-(cached + new) // 16) - len(shared_pages))]
            write(pages, len(shared_pages) * 16, cached + new)
            entries.append(BatchEntry(PageTable(pool, pages, cached), [0] * new, 0))
            queries.append(torch.randn(new, HEADS, d, generator=generator).to(dtype))
            slots = [pages[i // 16] * 16 + i % 16 for i in range(cached + new)]
            keys, values = (rows[LAYER][:, slots] for rows in (pool.keys, pool.values))
            expected.append(plain_attention(queries[-1], keys, values))
    return entries, torch.cat(queries), torch.cat(expected)


def attend(entries: list[BatchEntry], query: Tensor, *, share_prefixes: bool = True) -> Tensor:
    """The new tokens' keys and values are there already, and written once more."""
    pool = entries[0].cache.pool
    slots = [slot for cache, tokens, _ in entries for slot in cache.slots(len(tokens))]
    new = [rows[LAYER][:, slots].transpose(0, 1).contiguous() for rows in (pool.keys, pool.values)]
    batch = RunAttention(share_prefixes=share_prefixes).batch(entries)
    return attended(batch, query, *new, query.shape[2] ** -0.5, layer=LAYER)


@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_shared_pages_do_not_change_the_result(case: str, d: int, dtype: torch.dtype) -> None:
    entries, query, expected = batch_of(CASES[case], dtype, d)
    torch.testing.assert_close(attend(entries, query).double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernel_computes_the_same_numbers_bit_for_bit(case: str) -> None:
    """Each row meets the same blocks in the same order, so a text cannot depend on who shares a document."""
    entries, query, _ = batch_of(CASES[case], torch.bfloat16, 64)
    batch = RunAttention().batch(entries)
    assert isinstance(batch, RunBatch)
    if not batch.is_compiled:
        pytest.skip("there are no compiled kernels here")
    torch.testing.assert_close(attend(entries, query), attend(entries, query, share_prefixes=False), rtol=0, atol=0)


def test_shared_blocks_are_one_item_for_all_rows() -> None:
    entries, *_ = batch_of([(1024, [(20, 1)] * 8)], torch.bfloat16, 64)
    num_items = []
    for share_prefixes in (True, False):
        batch = RunBatch(entries, share_prefixes=share_prefixes)
        if not batch.is_compiled:
            pytest.skip("there are no compiled kernels here")
        num_items.append(batch.plan(HEADS, 1.0).words[1])
    blocks = 1024 // BLOCK
    assert num_items == [KV_HEADS * (blocks + 8), KV_HEADS * 8 * (blocks + 1)]


# Which sequences form a group


def saved(pages: list[list[int]], groups: list[PrefixGroup]) -> int:
    """How many reads of a page the groups save; they must be a partition, and share what they claim."""
    assert [first for first, _, _ in groups] == [0, *(end for _, end, _ in groups[:-1])]
    assert groups[-1].end == len(pages)
    for first, end, num_pages in groups:
        assert all(own[:num_pages] == pages[first][:num_pages] for own in pages[first:end])
        assert all(len(own) >= num_pages for own in pages[first:end])
        assert (num_pages > 0) == (end - first > 1)
    return sum((end - first - 1) * num_pages for first, end, num_pages in groups)


def most_saved(pages: list[list[int]], unit: int) -> int:
    """Over all ways to cut the sequences into neighbours."""
    best = 0
    for cuts in product([False, True], repeat=len(pages) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(pages)]
        total = 0
        for first, end in pairwise(edges):
            common = 0
            while all(len(own) > common and own[common] == pages[first][common] for own in pages[first:end]):
                common += 1
            total += (end - first - 1) * (common // unit * unit)
        best = max(best, total)
    return best


@pytest.mark.parametrize("unit", [1, 2])
def test_groups_save_the_most_reads(unit: int) -> None:
    generator = torch.Generator().manual_seed(unit)
    for _ in range(200):
        count, length = torch.randint(1, 7, (2,), generator=generator).tolist()
        pages = [torch.randint(2, (length,), generator=generator).tolist() for _ in range(count)]
        pages = sorted(own[: torch.randint(length + 1, (1,), generator=generator)] for own in pages)
        groups = prefix_groups(pages, unit)
        assert saved(pages, groups) == most_saved(pages, unit), pages
        assert all(group.num_pages % unit == 0 for group in groups)


def test_two_documents_behind_one_system_prompt_are_two_groups() -> None:
    """One page that all share is worth less than the documents."""
    documents = [[0, *range(10, 40)], [0, *range(50, 80)]]
    pages = [documents[i // 3] + [100 + i] for i in range(6)]
    assert prefix_groups(pages) == [PrefixGroup(0, 3, 31), PrefixGroup(3, 6, 31)]


# In the engine


def test_sequences_that_share_pages_are_scheduled_side_by_side() -> None:
    """The others keep their places: short requests first."""

    def task(name: str, pages: list[int]) -> Any:
        request = SimpleNamespace(table=SimpleNamespace(pages=pages), num_rows=1)
        return SimpleNamespace(name=name, request=request, num_left=len(name), is_in_prompt=False)

    tasks = [task("a", [0, 7]), task("b", [8]), task("c", [0, 1, 2]), task("dd", [3, 4]), task("eee", [0, 1, 5])]
    assert [running.name for running, _ in schedule(tasks, 100)] == ["c", "eee", "a", "b", "dd"]


@pytest.mark.parametrize("drafted", [0, 3])
def test_texts_about_one_document_are_those_of_each_alone(
    tiny_model: Callable[..., Model],
    engine: Callable[..., Engine],
    gates: Callable[[Model], Gate],
    monkeypatch: pytest.MonkeyPatch,
    drafted: int,
) -> None:
    """Two documents, asked about in turns, with drafts that are partly rejected."""
    documents = [random_tokens(600, seed=seed) for seed in (1, 2)]
    prompts = [documents[i % 2] + random_tokens(5 + i, seed=10 + i) for i in range(6)]
    groups: list[list[PrefixGroup]] = []

    class Watched(RunBatch):
        def __init__(self, entries: list[BatchEntry], **options: Any) -> None:
            super().__init__(entries, **options)
            groups.append(self._groups)

    monkeypatch.setattr("rapid.kernels.cpu.attention.RunBatch", Watched)

    def texts(share_prefixes: bool) -> list[list[int]]:
        model = tiny_model(VOCAB, attention=RunAttention(share_prefixes=share_prefixes))
        running = engine(model, kv_bytes=2**24)
        other, *sequences = [opened(running, prompt) for prompt in [[1, 2, 3], *prompts]]
        gate = gates(model)
        waited_for = running.submit(verification(other, Draft(0)))
        gate.wait()  # so that the next pass has all the others
        groups.clear()
        for i in range(6):
            drafts = [
                certain_draft(len(s.output), random_tokens(drafted and (drafted + k) % 4, seed=100 * i + k))
                for k, s in enumerate(sequences)
            ]
            rounds = [running.submit(verification(s, draft)) for s, draft in zip(sequences, drafts, strict=True)]
            gate.open()
            list(map(done, rounds))
        done(waited_for)
        return [s.output for s in sequences]

    shared = texts(share_prefixes=True)
    assert [group.num_pages for group in groups[1]] == [32, 32]
    assert shared == texts(share_prefixes=False)
    assert all(group.num_pages == 0 for each in groups for group in each)
