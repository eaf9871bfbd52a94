"""Endings that are no end: readers that leave, parts that fail. Nothing is kept, and nothing is complained about."""

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from gate import Gate
from running import GREEDY, begun, done, eventually
from world import Retrieval, World, complete, first_eight

from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.verify import prefill
from rapid.errors import SequenceClosed
from rapid.events import Delta
from rapid.generate import generate
from rapid.models.model import Model
from rapid.strategies import STRATEGIES

MakeEngine = Callable[..., Engine]


def quietly(main: Callable[[], Any]) -> None:
    """Runs ``main()``; nothing may be left behind that asyncio complains about when it is collected."""
    complaints: list[dict[str, Any]] = []

    async def listening() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await main()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(listening())
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_closing_the_iterator_early_frees_everything(world: World, strategy: str) -> None:
    async def main() -> None:
        completion = generate(world.request(strategy=strategy, max_tokens=400), world.backend())
        assert isinstance(await anext(completion), Delta)
        assert world.num_sequences() == (2 if strategy in ("speculative", "triforce", "rapid") else 1)
        await completion.aclose()
        assert world.num_sequences() == 0

    quietly(main)


@pytest.mark.parametrize("waits_for", ["target", "drafter"])
@pytest.mark.parametrize("passes", [0, 1, 2, 3])
def test_cancelling_the_reader_frees_everything(
    make_world: Callable[..., World], gates: Callable[[Model], Gate], waits_for: str, passes: int
) -> None:
    """In the middle of a prefill, a draft or a verification."""
    world = make_world(max_batch_tokens=10)
    gate = gates(getattr(world, waits_for).model)

    async def main() -> None:
        await cancelled_at(gate, passes, world)
        assert world.num_sequences() == 0
        gate.open()
        assert (await complete(world.request(), world.backend())).finish.reason == "length"

    asyncio.run(main())


async def cancelled_at(gate: Gate, passes: int, world: World) -> None:
    """A reader that is cancelled while its model is held at its gate, after so many passes."""
    reading = asyncio.create_task(complete(world.request(max_tokens=100), world.backend()))
    await asyncio.to_thread(gate.wait)
    for _ in range(passes):
        await asyncio.to_thread(gate.step)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


def test_a_cancelled_prefill_leaves_nothing_to_complain_about(
    make_world: Callable[..., World], gates: Callable[[Model], Gate]
) -> None:
    world = make_world(max_batch_tokens=10)
    gate = gates(world.target.model)

    async def main() -> None:
        await cancelled_at(gate, 0, world)
        gate.open()
        await complete(world.request(), world.backend())

    quietly(main)


def test_cancelling_during_the_retrieval_does_not_wait_for_it(world: World) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(*question: Any) -> Retrieval:
        asked.set()
        assert answer.wait(30)
        return first_eight(*question)

    async def main() -> None:
        reading = asyncio.create_task(complete(world.request(), world.backend(slow)))
        await asyncio.to_thread(asked.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert world.num_sequences() == 0
        answer.set()

    quietly(main)


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of memory")


def test_a_failing_target_is_raised_as_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.target.model, "forward", failing)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            await complete(world.request(), world.backend())
        assert world.num_sequences() == 0

    quietly(main)


@pytest.mark.parametrize("strategy", ["speculative", "rapid", "rag"])
def test_a_failing_retrieval_costs_the_draft_and_not_the_answer(world: World, strategy: str) -> None:
    async def main() -> None:
        answer = await complete(world.request(strategy=strategy), world.backend(failing))
        expected = await complete(world.request(strategy="autoregressive"), world.backend())
        assert (answer.tokens, answer.statistics.fallback) == (expected.tokens, "retrieval_failed")
        assert world.num_sequences() == 0

    quietly(main)


def test_a_pass_ends_at_the_next_layer_once_all_in_it_are_closed(
    tiny_model: Callable[..., Model], engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of a large model takes seconds on a CPU; whoever left must not hold memory and cores for so long."""
    model = tiny_model()
    running = engine(model)
    leaving, staying = begun(running, [1, 2, 3]), begun(running, [4, 5, 6])
    layers: list[int] = []
    batch = model.attention.batch

    def closing(entries: Any) -> Any:
        attention = batch(entries)
        attend = attention.attend

        def closing_attend(layer: int, *rest: Any) -> Any:
            layers.append(layer)
            running.close(leaving)
            return attend(layer, *rest)

        attention.attend = closing_attend
        return attention

    monkeypatch.setattr(model.attention, "batch", closing)
    with pytest.raises(SequenceClosed):
        done(running.submit(prefill(leaving)))
    assert layers == [0]
    done(running.submit(prefill(staying)))
    assert layers == [0, *range(model.layout.num_layers)]


def test_a_lease_cancelled_as_it_is_given_is_given_back(world: World) -> None:
    """The engine has admitted the sequence, and whoever asked for it is cancelled before it hears of that."""

    async def main() -> None:
        opening = asyncio.create_task(world.backend().lease("target", SequenceRequest([1, 2], 10, GREEDY)).__aenter__())
        await asyncio.sleep(0)
        eventually(lambda: world.num_sequences() == 1)  # without giving way to the event loop
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert world.num_sequences() == 0

    quietly(main)


def test_a_drafter_that_fails_unseen_leaves_nothing_to_complain_about(world: World) -> None:
    """Whoever reads leaves before the failure could be told."""

    may_fail = threading.Event()

    def failing(*question: Any) -> Retrieval:
        assert may_fail.wait(30)
        raise LookupError("the store is down")

    async def main() -> None:
        completion = generate(world.request(gamma="auto"), world.backend(failing))
        assert isinstance(await anext(completion), Delta)
        may_fail.set()
        await asyncio.sleep(0.1)
        await completion.aclose()
        assert world.num_sequences() == 0

    quietly(main)
