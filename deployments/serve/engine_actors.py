"""The application's engine actors, found by their names: all of them, whoever has leased there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray import serve

from deployments.serve.engines import engines_of
from deployments.serve.ray_errors import understood
from rapid.backend.waiting import TARGET_PATIENCE_S
from rapid.engine.messages import EngineStats
from rapid.errors import EngineHung, EngineLost

T = TypeVar("T")
logger = logging.getLogger("ray.serve")

_FIND_WITHIN_S = 1.5
_ANSWER_WITHIN_S = 3.0  # both before /health has to answer; busy cores must not look like a hang
_FORGET_WITHIN_S = 20.0


async def asked(part: str, question: Callable[[], Awaitable[T]], within_s: float = _ANSWER_WITHIN_S) -> T:
    """What ``part`` answers.

    Raises:
        EngineHung: it does not answer ``within_s``.
        EngineLost: it is gone.
    """
    try:
        async with asyncio.timeout(within_s):
            with understood(part, EngineLost):
                return await question()
    except TimeoutError as error:
        raise EngineHung(f"{part} has not answered for {within_s:g} s") from error


class EngineActors:
    """Handles by name. Ray's directory is asked each time, in a thread, which may hang with it."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._loaded: set[str] = set()  # those that have answered: a process that starts is silent, too
        self._looking: asyncio.Future[None] | None = None

    def has_leased(self, name: str) -> None:
        """It gave a lease. From now on its silence is a hang."""
        self._loaded.add(name)

    async def find(self, within_s: float = _FIND_WITHIN_S) -> None:
        """Learns which engines there are now. Where nobody tells, those that were there last are taken to be."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(asyncio.to_thread(self._look_up))
        done, _ = await asyncio.wait([self._looking], timeout=within_s)
        if done and (error := self._looking.exception()):
            logger.warning("Ray does not tell which engines there are: %s", error)

    def _look_up(self) -> None:
        mine = engines_of(serve.get_replica_context().app_name)
        found = {}
        for name in ray.util.list_named_actors():
            if name.startswith(mine):
                with suppress(ValueError):  # gone since
                    found[name] = self._handles.get(name) or ray.get_actor(name)
        self._handles = found

    async def stats(self, deployment: str) -> tuple[list[EngineStats], str | None]:
        """What the engines of ``deployment`` say, and what is wrong with how many of them, in words."""
        mine = engines_of(serve.get_replica_context().app_name, deployment)
        engines = {name: handle for name, handle in self._handles.items() if name.startswith(mine)}
        self._loaded &= set(self._handles)  # one that is gone does not come back
        said = await asyncio.gather(*(self._stats(name, engine) for name, engine in engines.items()))
        stats = [each for each in said if isinstance(each, EngineStats)]
        problems = [each for each in said if isinstance(each, str)]
        problems += [stuck for each in stats if (stuck := each.pulse.problem(TARGET_PATIENCE_S))]
        num_loaded = sum(each is not None for each in said)
        if problems and num_loaded > 1:
            return stats, f"{len(problems)} of {num_loaded} engines: {problems[0]}"
        return stats, problems[0] if problems else None

    async def _stats(self, name: str, engine: Any) -> EngineStats | str | None:
        """None for an engine that is gone or not there yet."""
        try:
            stats: EngineStats | None = await asked("the engine", engine.stats.remote)
        except EngineHung as error:
            return error.message if name in self._loaded else None
        except EngineLost:
            return None
        if stats is not None:
            self._loaded.add(name)
        return stats

    async def forget(self, tokens: list[int], salt: str) -> None:
        """Makes all engines forget what they cached of a text with these ``tokens``."""
        await self.find(_FORGET_WITHIN_S)
        for name, engine in self._handles.items():
            # Gone since, or hung and about to be killed, and what it held with it.
            with suppress(EngineLost):
                await asked(f"the engine {name}", partial(engine.forget.remote, tokens, salt), _FORGET_WITHIN_S)
