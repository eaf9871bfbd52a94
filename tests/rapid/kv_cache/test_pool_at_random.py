"""Whatever sequences do to a pool of pages, each reads what it wrote."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from pools import PAGE, opened, pool_of, write
from running import contents
from torch import Tensor

from rapid.kv_cache.pool import KVCache


def markers(tokens: list[int]) -> Tensor:
    """A row for each token that depends on all tokens up to it, as keys do: [KV heads, n, head size]."""
    marks = [hash(tuple(tokens[: i + 1])) % 2**20 for i in range(len(tokens))]
    return torch.tensor(marks, dtype=torch.float32)[None, :, None].expand(3, len(marks), 4)


@dataclass
class User:
    """A sequence as an engine runs it: the prompt in chunks, then output that may be rolled back."""

    cache: KVCache
    prompt: list[int]
    output: list[int] = field(default_factory=list)

    def check(self) -> None:
        expected = markers((self.prompt + self.output)[: self.cache.length])
        assert torch.equal(contents(self.cache)[0][1], expected)

    def extend(self, tokens: list[int]) -> None:
        write(self.cache, markers([*(self.prompt + self.output)[: self.cache.length], *tokens])[:, -len(tokens) :])
        self.cache.advance(len(tokens))

    def step(self, rng: random.Random) -> None:
        length, pool, last = self.cache.length, self.cache.pool, len(self.prompt) - 1
        if length < last:
            pool.adopt(self.cache, self.prompt)
            length = self.cache.length
            if length < last:
                self.extend(self.prompt[length : min(last, length + rng.randint(1, 9))])
                pool.insert(self.cache, self.prompt, self.cache.length)
            return
        if self.output and rng.random() < 0.3:
            del self.output[rng.randrange(len(self.output)) :]
            self.cache.truncate(len(self.prompt) + len(self.output))
        new = ([self.prompt[-1]] if self.cache.length == last else []) + [rng.randint(0, 1) for _ in range(3)]
        if self.cache.length + len(new) <= self.cache.capacity:
            self.output += new[-3:]
            self.extend(new)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_nobody_s_past_changes_and_no_page_is_lost(seed: int) -> None:
    """Sequences over two letters share, adopt, roll back and evict; each keeps reading what it wrote."""
    rng, pool = random.Random(seed), pool_of(24)
    users: list[User] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.25:
            prompt = [0] * rng.randint(0, 12) + [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
            cache = pool.open(prompt, len(prompt) + rng.randint(4, 16))
            users += [User(cache, prompt)] if cache else []
        elif action < 0.9 and users:
            rng.choice(users).step(rng)
        elif action < 0.98 and users:
            user = users.pop(rng.randrange(len(users)))
            pool.insert(user.cache, user.prompt + user.output, user.cache.length)
            pool.close(user.cache)
        elif action >= 0.98:
            pool.evict_unused()
        for user in users:
            user.check()
        own = [page for user in users for page in user.cache.pages[user.cache.num_shared :]]
        shared = {page for user in users for page in user.cache.pages[: user.cache.num_shared]}
        assert len(own) == len(set(own))
        assert not shared & set(own)
        assert pool.stats().bytes_used == (len(own) + len(shared)) * pool.page_bytes
    for user in users:
        pool.close(user.cache)
    pool.evict_unused()
    assert pool.stats()[1:3] == (0, 0)
    assert pool.stats().hit_tokens > 100
    assert pool.stats().evicted_pages > 20
    opened(pool, [7], pool.num_pages * PAGE)
