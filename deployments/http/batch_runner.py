"""Answers the requests of batches, each as if its client had sent it alone: through the API itself."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.files.batch_records import BatchTaken, Record
from deployments.http.rate_limits import ASKED_FOR
from deployments.http.request_log import ID_HEADER
from deployments.schemas.batches import Line, Wrong, answer_line, read_lines
from rapid.errors import RapidError

if TYPE_CHECKING:
    from deployments.service import Service

logger = logging.getLogger("ray.serve")

BEAT_S = 2.0  # between two looks at a batch: is it cancelled, has it expired
_LOOK_S = 5.0  # between two looks for batches that another process has left
_MOST_TRIES = 4  # of a request for which the service has no place; one that only its rate holds up waits
_LONGEST_PAUSE_S = 60.0


class WrongInput(Exception):
    """The input file has faults, and none of its requests is sent."""

    def __init__(self, wrong: list[Wrong]) -> None:
        super().__init__(wrong[0].message)
        self.wrong = wrong


class BatchRunner:
    """Claims batches of ``service`` and sends their requests to ``app``, ``at_once`` of each batch at a time.

    ``app`` checks, counts, limits and logs them as the requests of the batch's client.
    """

    def __init__(self, app: ASGIApp, service: Service, at_once: int) -> None:
        self._app, self._service, self._at_once = app, service, at_once
        self._woken = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Looks for batches, until there are none."""
        self._woken.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops; what is not answered yet is left to another process."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        answering: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._woken.clear()
                try:
                    claim = await self._service.batches.claim(uuid.uuid4().hex)
                except Exception as error:
                    logger.warning("no batch could be claimed: %s", error)
                    await asyncio.sleep(_LOOK_S)
                    continue
                if claim.record is not None:
                    answering.add(asyncio.create_task(self._answer(claim.record)))
                    continue
                if not (claim.are_any_left or answering or self._woken.is_set()):
                    return
                woken = asyncio.create_task(self._woken.wait())
                await asyncio.wait([woken, *answering], timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                answering = {task for task in answering if not task.done()}
        finally:
            for task in answering:
                task.cancel()

    async def _answer(self, record: Record) -> None:
        """Answers one batch to its end, or until it is cancelled, has expired, or is taken by another process."""
        work = asyncio.create_task(self._answer_all(record))
        try:
            status, wrong = await self._watch(record, work)
            await self._service.batches.finish(record, status, [each._asdict() for each in wrong])
        except BatchTaken:
            pass
        except Exception as error:  # the claim ends soon, and then the batch goes on
            logger.warning("the batch %s was left", record.id, exc_info=error)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _watch(self, record: Record, work: asyncio.Task[None]) -> tuple[str, list[Wrong]]:
        """How the batch ends: its last status, and what was wrong with its input."""
        while not work.done():
            await asyncio.wait([work], timeout=BEAT_S)
            status = await self._service.batches.beat(record)
            if status == "cancelling" or time.time() > record.batch["expires_at"]:
                work.cancel()
                await asyncio.wait([work])
                return "cancelled" if status == "cancelling" else "expired", []
        try:
            work.result()
        except WrongInput as error:
            return "failed", error.wrong
        except RapidError as error:
            if error.status >= 500:
                raise
            # There is no room for more answers, or the input is gone.
            return "failed", [Wrong(error.code, error.message, error.param)]
        return "completed", []

    async def _answer_all(self, record: Record) -> None:
        batches = self._service.batches
        _, data = await self._service.files.content(record.tenant, record.batch["input_file_id"])
        lines, wrong = await asyncio.to_thread(read_lines, data, record.batch["endpoint"])
        if wrong:
            raise WrongInput(wrong)
        answered = await batches.begin(record, len(lines))
        left = (line for line in lines if line.custom_id not in answered)

        async def answer_next(http: httpx.AsyncClient) -> None:
            for line in left:
                await batches.add_answer(record, await _ask(http, line))

        async with self._client(record) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._at_once):
                        group.create_task(answer_next(http))
            except* Exception as errors:
                raise errors.exceptions[0] from None

    def _client(self, record: Record) -> httpx.AsyncClient:
        """What it sends are requests of the batch's client to the API."""

        async def asked_for(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, ASKED_FOR: record}, receive, send)

        transport = httpx.ASGITransport(asked_for, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)


async def _ask(http: httpx.AsyncClient, line: Line) -> str:
    """The line of the output for ``line``. Where there is no place for the request, it is sent again later."""
    tries = 0
    while True:
        request_id = uuid.uuid4().hex
        answer = await http.post(line.url, json=line.body, headers={ID_HEADER: request_id})
        tries += answer.status_code == 503
        if answer.status_code not in (429, 503) or tries == _MOST_TRIES:
            return answer_line(request_id, line.custom_id, answer.status_code, answer.content)
        await asyncio.sleep(min(_LONGEST_PAUSE_S, float(answer.headers.get("retry-after", 1))))
