"""The pool of pages: what is known is found, shared pages are never written, and no room is lost."""

import pytest
import torch
from pools import LAYOUT, PAGE, opened, pool_of, write
from running import contents
from torch import Tensor

from rapid.kv_cache.pool import KVCache, KVPool

A, B, C = (list(range(start, start + 2 * PAGE)) for start in (0, 100, 200))  # two pages each


def filled(pool: KVPool, tokens: list[int]) -> KVCache:
    """A sequence whose tokens are all computed and can be found."""
    cache = opened(pool, tokens)
    cache.advance(len(tokens) - cache.length)
    pool.insert(cache, tokens, cache.length)
    return cache


def num_known(pool: KVPool, tokens: list[int]) -> int:
    """How many of ``tokens`` would be found; counts as a use of them."""
    cache = opened(pool, [*tokens, -1], 0)
    found = cache.length
    pool.close(cache)
    return found


def rows(start: int, n: int) -> Tensor:
    """``n`` rows that tell their position: [KV heads, n, head size]."""
    return torch.arange(start, start + n, dtype=torch.float32)[None, :, None].expand(3, n, 4)


# One sequence


def test_a_cache_is_written_behind_what_is_filled_and_cut_by_its_length() -> None:
    cache = opened(pool_of(3), [], 10)
    write(cache, rows(0, 6))
    assert cache.length == 0  # an interrupted pass leaves the cache as it was
    cache.advance(6)
    cache.truncate(4)
    write(cache, rows(100, 3))
    cache.advance(3)
    expected = torch.cat([rows(0, 4), rows(100, 3)], 1).expand(2, 3, 7, 4)
    keys, values = contents(cache)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)
    cache.truncate(9)
    assert cache.length == 7  # rolling back never goes forward


@pytest.mark.parametrize(("filled", "new"), [(12, 1), (11, 2), (0, 13)])
def test_a_full_cache_refuses_to_be_written(filled: int, new: int) -> None:
    """One row too many must not be dropped in silence: attention would then miss the newest token."""
    cache = opened(pool_of(5), [], 12)
    cache.advance(filled)
    with pytest.raises(ValueError, match=f"12 tokens.*{filled + new}"):
        write(cache, rows(0, new))


def test_a_pool_takes_the_memory_it_says() -> None:
    assert LAYOUT.bytes_per_token == 2 * 2 * 3 * 4 * 4
    budget = 1000 * LAYOUT.bytes_per_token + 17
    pool = KVPool(LAYOUT, budget, page_size=16)
    assert pool.num_pages == 62
    assert pool.stats().bytes_total == 62 * pool.page_bytes <= budget
    held = sum(rows.nbytes for rows in (*pool.keys, *pool.values))
    assert held == 63 * pool.page_bytes  # and the spare page


def test_runs_are_the_slots_in_order_with_neighbours_joined() -> None:
    pool = pool_of(8)
    cache = KVCache(pool, [5, 6, 2, 3, 0], num_shared=0)
    assert cache.runs(20) == [(20, 28), (8, 16), (0, 4)]
    assert cache.runs(9) == [(20, 28), (8, 9)]
    assert cache.runs(8) == [(20, 28)]
    assert cache.runs(0) == []
    cache.advance(7)
    assert cache.slots(3) == [27, 8, 9]


# Sharing


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (A, 4),  # never the last token: feeding it is what gives the first logits
        ([*A, 50], 8),
        ([*A, *B], 8),
        ([*A[:6], 50, 51, 52], 4),
        ([50, *A], 0),
        ([*B[:4], *A[4:], 50], 0),  # the same tokens behind others are others
        (A[:3], 0),
        ([], 0),
    ],
)
def test_a_prompt_finds_the_full_pages_of_its_beginning(prompt: list[int], found: int) -> None:
    pool = pool_of(20)
    first = filled(pool, A)
    for _ in range(2):  # while the first is open, and after
        cache = opened(pool, prompt, 30)
        assert (cache.length, cache.num_shared) == (found, found // PAGE)
        assert cache.pages[: cache.num_shared] == first.pages[: cache.num_shared] or not first.pages
        assert cache.capacity == 32
        pool.close(cache)
        pool.close(first)


def test_a_sequence_adopts_what_another_has_computed_since() -> None:
    """Two read the same prompt; the second goes on from wherever the first is."""
    pool = pool_of(20)
    prompt = [*A, *B, 50]
    first, second = opened(pool, prompt), opened(pool, prompt)
    pool.adopt(second, prompt)
    assert second.length == 0
    for done in (8, 16):
        first.advance(8)
        pool.insert(first, prompt, first.length)
        pool.adopt(second, prompt)
        assert (second.length, second.capacity) == (done, 20)
        assert second.pages[: done // PAGE] == first.pages[: done // PAGE]
    stats = pool.stats()
    assert (stats.hit_tokens, stats.miss_tokens) == (16, 2 * 17 - 16)
    assert stats.bytes_used == (4 + 1 + 1) * pool.page_bytes  # what was given up for the shared pages is free again
    pool.close(first)
    pool.close(second)
    assert pool.stats().bytes_used == 0


def test_adopting_compares_with_what_is_still_to_be_read() -> None:
    """And not with the beginning of the prompt: another's second page may hold the tokens of the first."""
    pool = pool_of(20)
    prompt = [*A[:4], *B]
    cache = opened(pool, prompt)
    cache.advance(4)
    pool.insert(cache, prompt, 4)
    filled(pool, [*A[:4], *A[:4], 50])
    pool.adopt(cache, prompt)
    assert (cache.length, cache.num_shared) == (4, 1)


def test_nothing_is_adopted_in_the_middle_of_a_page_or_behind_another_text() -> None:
    pool = pool_of(20)
    half, other = opened(pool, A), opened(pool, [*B[:4], *A[4:], 50])
    half.advance(2)
    other.advance(4)  # computed and not indexed
    filled(pool, [*A, 50])
    for cache, prompt in ((half, A), (other, [*B[:4], *A[4:], 50])):
        length = cache.length
        pool.adopt(cache, prompt)
        assert (cache.length, cache.num_shared) == (length, 0)


def test_what_two_computed_at_once_is_kept_once() -> None:
    pool = pool_of(20)
    first, second = opened(pool, A), opened(pool, A)
    for cache in (first, second):
        cache.advance(8)
        pool.insert(cache, A, 8)
    assert first.pages == second.pages
    assert pool.stats().bytes_used == 2 * pool.page_bytes
    pool.close(first)
    assert pool.stats().bytes_used == 2 * pool.page_bytes
    pool.close(second)
    assert pool.stats()[1:3] == (0, 2 * pool.page_bytes)


def test_a_rollback_into_shared_pages_is_refused() -> None:
    """Whoever wrote there would write into another sequence's past."""
    pool = pool_of(20)
    filled(pool, [*A, 50])
    cache = opened(pool, [*A, 60], 20)
    cache.advance(5)
    cache.truncate(8)
    with pytest.raises(ValueError, match="7 tokens cuts into 2 shared pages"):
        cache.truncate(7)
    assert cache.length == 8


# Room


def test_the_least_recently_used_is_evicted_and_of_a_text_the_end_first() -> None:
    pool = pool_of(6)
    for text in (A, B, C):
        pool.close(filled(pool, text))
    assert num_known(pool, A) == 8  # a use: now B is the oldest
    known = []
    for i in range(6):
        opened(pool, [1000 + i])
        known.append((num_known(pool, B), num_known(pool, C), num_known(pool, A)))
    assert known == [(4, 8, 8), (0, 8, 8), (0, 4, 8), (0, 0, 8), (0, 0, 4), (0, 0, 0)]
    assert pool.stats().evicted_pages == 6


def test_a_full_pool_says_so_and_changes_nothing() -> None:
    pool = pool_of(4)
    first = filled(pool, [*A, 50])
    before = pool.stats()
    assert pool.open([*A, 60], 5 * PAGE) is None  # two are shared, and of three more there is one
    assert pool.stats() == before
    assert pool.open([*A, 60], 3 * PAGE) is not None
    pool.close(first)
    assert pool.open(C, 2 * PAGE) is None  # the shared pages are still in use
    assert pool.open(C, PAGE) is not None


def test_stats_say_what_is_held_kept_found_and_evicted() -> None:
    pool = pool_of(4)
    page = pool.page_bytes
    cache = filled(pool, [*A, 50])
    assert pool.stats() == (4 * page, 3 * page, 0, 0, 9, 0)
    pool.close(cache)
    assert pool.stats() == (4 * page, 0, 2 * page, 0, 9, 0)
    cache = opened(pool, [*A, 60])
    assert pool.stats() == (4 * page, 3 * page, 0, 8, 10, 0)
    pool.close(cache)
    opened(pool, C, 3 * PAGE)
    assert pool.stats()[1] == 3 * page
    assert pool.stats()[3:5] == (8, 18)
    assert pool.stats()[5] >= 1


def test_forgetting_drops_what_nobody_uses() -> None:
    pool = pool_of(10)
    pool.close(filled(pool, A))
    filled(pool, B)
    pool.evict_unused()
    assert (num_known(pool, A), num_known(pool, B)) == (0, 8)
    assert pool.stats()[1:3] == (2 * pool.page_bytes, 0)


def test_dropping_a_text_forgets_it_wherever_it_stands_and_what_follows_it() -> None:
    pool = pool_of(20)
    head, question = [300, 301, 302, 303], [310, 311, 312, 313]
    for tokens in (B, [*head, *A, *question], [*B, 77, 78, *A]):
        pool.close(filled(pool, tokens))
    assert pool.forget(A) == 3 + 1  # of the second text both pages and the question; of the third a page full of A
    assert (num_known(pool, [*head, *A]), num_known(pool, [*B, 77, 78, *A])) == (4, 12)
    assert pool.stats().bytes_cached == 4 * pool.page_bytes and pool.forget(A) == 0 == pool.forget(C)


def test_a_text_dropped_while_it_is_read_goes_with_the_sequence() -> None:
    pool = pool_of(10)
    cache = opened(pool, [*A, *B], 20)
    cache.advance(8)
    pool.insert(cache, [*A, *B], 8)
    assert pool.forget(A) == 2
    assert num_known(pool, A) == 0 and pool.stats().bytes_used == 5 * pool.page_bytes
    cache.advance(8)
    pool.insert(cache, [*A, *B], 16)
    pool.close(cache)
    assert pool.stats().bytes_cached == 0 and num_known(pool, [*A, *B]) == 0


# Salts


def test_prompts_with_another_salt_find_and_forget_nothing() -> None:
    pool = pool_of(16)

    def cache_of(salt: str) -> KVCache:
        cache = pool.open([*A, *B], len(A) + len(B), salt)
        assert cache is not None
        return cache

    first = cache_of("ours")
    first.advance(len(A) + len(B))
    pool.insert(first, [*A, *B], first.length)
    found = {salt: cache_of(salt) for salt in ("", "theirs", "ours")}
    assert [cache.length for cache in found.values()] == [0, 0, len(A) + len(B) - PAGE]
    for cache in (first, *found.values()):
        pool.close(cache)
    assert pool.forget(A, "theirs") == pool.forget(A) == 0
    assert pool.forget(A, "ours") == 4
