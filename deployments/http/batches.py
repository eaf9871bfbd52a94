"""OpenAI's routes for batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Request

from deployments.http.batch_runner import BatchRunner
from deployments.http.errors import read
from deployments.http.listing import listed
from deployments.http.openapi import ERRORS, BatchObject, describe_body
from deployments.http.rate_limits import client_of
from deployments.schemas.batches import BatchRequest

if TYPE_CHECKING:
    from deployments.service import Service


def add_batch_routes(app: FastAPI, service: Service, runner: BatchRunner) -> None:
    """`/v1/batches`: every answer is about the client's own batches, which ``runner`` answers."""

    @app.post("/v1/batches", **describe_body(BatchRequest, answer=BatchObject))
    async def create(request: Request) -> dict[str, Any]:
        body, client = await read(BatchRequest, request), client_of(request)
        batch = await service.batches.create(client.tenant, client.name, body.model_dump())
        runner.wake()
        return batch

    @app.get("/v1/batches", responses=ERRORS)
    async def list_batches(
        request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> dict[str, Any]:
        return listed(await service.batches.list_batches(client_of(request).tenant), limit, after, "batch")

    @app.get("/v1/batches/{batch_id}", responses=ERRORS)
    async def get(request: Request, batch_id: str) -> dict[str, Any]:
        return await service.batches.get(client_of(request).tenant, batch_id)

    @app.post("/v1/batches/{batch_id}/cancel", responses=ERRORS)
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        return await service.batches.cancel(client_of(request).tenant, batch_id)
