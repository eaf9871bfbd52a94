"""An engine that can do nothing any more: nobody waits for it, and whoever started it can know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import GREEDY, VOCAB, begun, done, random_tokens

from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import Task
from rapid.engine.verify import prefill
from rapid.errors import EngineLost
from rapid.models.model import Model

MakeEngine = Callable[..., Engine]


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(VOCAB)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("model.forward", EngineLost("a rank is gone")),
        ("model.forward", torch.AcceleratorError("device-side assert")),
        ("_pool.adopt", KeyError("no page's fault")),
    ],
)
def test_what_breaks_an_engine_is_told_to_everyone(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    running = engine(model, kv_bytes=40 * 16 * model.layout.bytes_per_token)
    sequence, other = (begun(running, random_tokens(20, seed=s), room=280) for s in (17, 18))
    waiting = running.open(SequenceRequest([1, 2], 280, GREEDY))

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    part, _, method = where.rpartition(".")
    monkeypatch.setattr(getattr(running, part), method, broken)
    under_way = [running.submit(prefill(s)) for s in (sequence, other)]
    running.ended.result(timeout=30)
    late = running.submit(prefill(other)), running.open(SequenceRequest([1, 2], 10, GREEDY))
    for failed in (*under_way, waiting, *late):
        with pytest.raises(EngineLost, match=f"broken: .*{error.args[0]}"):
            done(failed)


def test_a_device_that_fails_between_passes_breaks_the_engine(model: Model, engine: MakeEngine) -> None:
    def sampling() -> Task[None]:
        raise torch.AcceleratorError("an illegal address, of some earlier kernel")
        yield

    running = engine(model)
    with pytest.raises(EngineLost, match="an illegal address"):
        done(running.submit(sampling()))
    running.ended.result(timeout=30)
