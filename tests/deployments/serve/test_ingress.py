"""The ingress without a cluster: what it makes of errors that cross processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from deployments.schemas.completions import Completion
from deployments.schemas.text import TextRequest
from deployments.serve.ingress import RemoteService
from rapid.errors import EngineLost, InvalidRequest, RapidError


def stopped(why: str) -> tuple[str, str, int]:
    return f"a part of the service stopped while it worked on this request ({why}); try again", "internal_error", 503


COMPLETION: Completion = TextRequest(model="m", prompt="p")


def crossed(error: Exception) -> Exception:
    """``error`` as Ray raises it in another process."""
    raised: Exception = RayTaskError("generate", "a traceback", error).as_instanceof_cause()
    return raised


class Coordinator:
    """A handle whose calls raise ``error``, or give it as a value."""

    def __init__(self, error: Exception, *, as_value: bool) -> None:
        self._error, self._as_value = error, as_value
        self.was_cancelled = False
        self.call = SimpleNamespace(remote=self._call)
        self.generate = SimpleNamespace(remote=lambda *_: Events(self))

    def options(self, **_: Any) -> Coordinator:
        return self

    async def _call(self, *_: Any) -> Exception:
        if self._as_value:
            return self._error
        raise self._error


class Events:
    """The stream of such a handle."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def __aiter__(self) -> AsyncIterator[Exception]:
        return self

    async def __anext__(self) -> Exception:
        return await self._coordinator._call()

    def cancel(self) -> None:
        self._coordinator.was_cancelled = True


async def ask_health(service: RemoteService) -> None:
    await service.health()


async def generate(service: RemoteService) -> None:
    async for _ in service.generate(COMPLETION, "public"):
        pass


async def list_files(service: RemoteService) -> None:
    await service.files.list_files("public")


@pytest.mark.parametrize("ask", [ask_health, generate, list_files])
@pytest.mark.parametrize(
    ("error", "as_value", "seen"),
    [
        (InvalidRequest("n is wrong", param="n"), True, ("n is wrong", "invalid_request", 400)),
        (crossed(EngineLost("no target answers")), False, ("no target answers", "engine_lost", 503)),
        (crossed(ZeroDivisionError()), False, stopped("the coordinator failed")),
        (ActorDiedError(), False, stopped("the coordinator is gone")),
    ],
    ids=["of the request", "of an engine", "unexpected", "a process that died"],
)
def test_every_error_is_one_that_a_client_may_see(
    ask: Callable[[RemoteService], Any], error: Exception, as_value: bool, seen: tuple[str, str, int]
) -> None:
    coordinator = Coordinator(error, as_value=as_value)
    with pytest.raises(RapidError) as caught:
        asyncio.run(ask(RemoteService(coordinator)))  # type: ignore[arg-type]
    assert (caught.value.message, caught.value.code, caught.value.status) == seen
    assert coordinator.was_cancelled == (ask is generate)


def test_serve_is_loaded_without_pandas_which_others_still_find() -> None:
    code = (
        "import sys; from deployments.serve.worker import without_pandas; without_pandas(); "
        "print('ray.serve' in sys.modules, 'pandas' in sys.modules); import pandas; print(pandas.__name__)"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "False", "pandas"]


def test_the_body_of_a_request_that_failed_is_not_kept_by_its_error() -> None:
    code = """if True:
        import gc, threading, weakref
        from deployments.serve import worker

        class Body:
            pass

        def fail(body):
            try:
                raise ValueError
            except ValueError as error:
                kept = error  # whose traceback has this frame

        worker._GIVE_BACK_EVERY_S = 0.01
        gc.disable()
        gc.freeze()  # as Serve does
        worker.prepare_for_streams()
        body, gone = Body(), threading.Event()
        weakref.finalize(body, gone.set)
        fail(body)
        del body
        print(gone.wait(30))
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True"], ended.stderr
