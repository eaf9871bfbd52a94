"""What the tests of the core share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from gate import Gate
from transformers import PreTrainedTokenizerFast
from world import World

from rapid.engine.engine import Engine
from rapid.engine.torch_thread import compute
from rapid.models.model import Model


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of a few thousand weights gain nothing from more, and other tests run beside these."""
    before = torch.get_num_threads()

    def take(threads: int) -> None:
        torch.set_num_threads(threads)
        compute(torch.set_num_threads, threads)  # it is each thread's own

    take(1)
    yield
    take(before)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Model], Gate]]:
    """Puts gates before models' forward passes, and opens them after the test."""
    made: list[Gate] = []

    def make(model: Model) -> Gate:
        made.append(Gate(model, monkeypatch))
        return made[-1]

    yield make
    for gate in made:
        gate.open()


@pytest.fixture
def make_world(
    tiny_model: Callable[..., Model],
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
    engine: Callable[..., Engine],
) -> Callable[..., World]:
    def make(
        vocab_size: int = 12,
        *,
        eos: int | None = None,
        window: int = 512,
        drafter_window: int = 512,
        max_batch_tokens: int = 512,
    ) -> World:
        target = tiny_model(vocab_size, seed=1, layers=1, eos=eos, window=window)
        drafter = tiny_model(vocab_size, seed=2, layers=1, eos=eos, window=drafter_window)
        engines = [engine(model, max_batch_tokens=max_batch_tokens, max_queued=1000) for model in (target, drafter)]
        return World(*engines, letter_tokenizer(vocab_size))

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
