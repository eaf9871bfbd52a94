"""Three ranks that share a model compute what one process with all of it does: passes, drafts, rollbacks, prefixes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from running import GREEDY, ROUNDING, begun, done, logits_after, new_cache, proposal, random_tokens, verification
from transformers import PreTrainedModel

from rapid.engine.engine import Engine
from rapid.engine.verify import prefill
from rapid.errors import EngineLost, ModelFileError
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.table import PageTable
from rapid.models.info import RankPlacement
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.models.tensor_parallel import Group, follow
from rapid.speculation.draft import Draft, DraftLimits
from rapid.text.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' and torch's own, in distributed code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RANKS = 3
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def follow_first(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    model = load_model(folder, dtype="float32", placement=RankPlacement(rank + 1, RANKS, address))
    with pytest.raises(EngineLost):  # the first rank has left
        follow(model)


@pytest.fixture(scope="module")
def folder(tiny_network: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, its vocabulary no multiple of the ranks, with the tokenizer of an embedded one."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_network(1000, tie_word_embeddings=True, attention_bias=True, **SHAPE).save_pretrained(folder)
    load_tokenizer("smollm2-135m-instruct").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Model:
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Model]:
    """The first rank's model; the other ranks are processes of their own."""
    address = free_address()
    others = multiprocessing.spawn(follow_first, (address, str(folder)), nprocs=RANKS - 1, join=False)
    yield load_model(str(folder), dtype="float32", placement=RankPlacement(0, RANKS, address))
    dist.destroy_process_group()
    for process in others.processes:
        process.terminate()
        process.join()


def test_each_rank_holds_its_share(shared: Model, whole: Model) -> None:
    norms_are_whole = 1.2
    assert shared.info.weight_bytes < norms_are_whole * whole.info.weight_bytes / RANKS
    assert shared.layout.num_kv_heads == 1
    assert shared.info.kv_bytes_per_token * RANKS == whole.info.kv_bytes_per_token


@pytest.mark.parametrize("lengths", [[1], [7], [40, 3, 1]])
def test_a_pass_of_three_ranks_equals_one_of_all(shared: Model, whole: Model, lengths: list[int]) -> None:
    def rows(model: Model) -> list[torch.Tensor]:
        pool = model.new_pool(2**18)
        caches = [pool.open([], 100) for _ in lengths]
        tokens = [random_tokens(n, seed=n) for n in lengths]
        for rounds in range(2):  # the second goes on behind the first
            logits = model.forward(
                [BatchEntry(c, t, rounds) for c, t in zip(caches, tokens, strict=True) if c is not None]
            )
        return logits

    for ours, expected in zip(rows(shared), rows(whole), strict=True):
        torch.testing.assert_close(ours, expected, **ROUNDING)


def drafts(model: Model) -> list[list[int]]:
    """Greedy drafts of two sequences that share a prefix, after a rejection and a longer text."""
    engine = Engine(model, kv_bytes=2**20)
    prompt, drafted = random_tokens(50, seed=3), []
    for tail in ([], [5]):
        sequence = begun(engine, prompt + tail)
        done(engine.submit(prefill(sequence)))
        draft = done(engine.submit(proposal(sequence, 0, [], DraftLimits(6), 8, frozenset())))
        again = done(engine.submit(proposal(sequence, 0, [*draft.tokens[:2], 9], DraftLimits(6), 8, frozenset())))
        target = begun(engine, prompt + tail)
        verified = done(engine.submit(verification(target, Draft(0, draft.tokens), "lossless", 0.0)))
        assert target.cached_tokens or not tail
        drafted += [draft.tokens, again.tokens, verified.tokens]
    engine.shutdown()
    return drafted


def test_the_engine_drafts_verifies_and_rolls_back_alike(shared: Model, whole: Model) -> None:
    assert GREEDY.temperature == 0
    assert drafts(shared) == drafts(whole)


@pytest.mark.parametrize("use", [lambda model: model.new_pool(1), lambda model: model.forward([])])
def test_a_rank_that_hears_nothing_is_an_engine_that_is_lost(
    shared: Model, monkeypatch: pytest.MonkeyPatch, use: Callable[[Model], Any]
) -> None:
    def broadcast(message: object) -> None:
        raise RuntimeError("Connection closed by peer")

    assert shared.group is not None
    monkeypatch.setattr(shared.group, "broadcast", broadcast)
    with pytest.raises(EngineLost, match="closed by peer"):
        use(shared)


def test_the_first_pass_waits_until_all_ranks_have_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass gives the others minutes; a large model may load for longer than that on one rank than on another."""
    called: list[str] = []

    class Alone(Group):
        def __init__(self, placement: RankPlacement, device: str) -> None:
            self.placement = placement

        def __getattribute__(self, name: str) -> Any:
            if name not in ("broadcast", "wait", "all_reduce", "all_gather"):
                return object.__getattribute__(self, name)
            called.append(name)
            return lambda x=None, *_: x

        def plan(self) -> None:
            return None

    monkeypatch.setattr("rapid.models.loader.Group", Alone)
    load_model(str(folder), dtype="float32", placement=RankPlacement(0, 1, ""))
    assert called[:2] == ["wait", "broadcast"]


def read_in_few_bits(rank: int, address: str, folder: str, read: Any) -> None:
    torch.set_num_threads(1)
    model = load_model(folder, quantization="int8", placement=RankPlacement(rank, RANKS, address))
    if rank == 0:
        read.put(logits_after(model, random_tokens(40, seed=1)).tolist())
    else:
        with pytest.raises(EngineLost):  # the first rank has left
            follow(model)


def test_weights_of_few_bits_are_shared_too_and_whoever_follows_notices_the_end(folder: Path) -> None:
    """Each rank rounds its own share, so that the sums differ a little from those of one process."""
    read = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(read_in_few_bits, (free_address(), str(folder), read), nprocs=RANKS)
    whole = load_model(str(folder), quantization="int8")
    expected = logits_after(whole, random_tokens(40, seed=1))
    assert (torch.tensor(read.get()) - expected).norm() < 0.03 * expected.norm()


def test_ranks_that_never_meet_are_an_error() -> None:
    # In a process of its own: torch counts the groups of a process, also those that never came about.
    meet = f"""
from datetime import timedelta
from rapid.models import tensor_parallel as parallel
parallel._JOIN_TIMEOUT = timedelta(milliseconds=200)
parallel.Group(parallel.RankPlacement(1, 2, "{free_address()}"), "cpu")
"""
    ended = subprocess.run([sys.executable, "-c", meet], capture_output=True, text=True)
    assert "EngineLost: rank 1 did not meet the others" in ended.stderr


def test_heads_that_cannot_be_shared_are_refused(shared: Model, tiny_network: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ModelFileError, match="2 KV heads cannot be shared by 3 ranks"):
        Model(tiny_network(), None, "tiny", group=shared.group)


def test_a_follower_sees_the_first_rank_s_pages(whole: Model) -> None:
    cache = new_cache(whole, 20)
    assert PageTable(cache.pool, cache.pages, 5).slots(2) == [cache.pages[0] * 16 + 5, cache.pages[0] * 16 + 6]
