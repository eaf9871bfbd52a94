"""OpenAI's routes for files that come in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile

from deployments.http.errors import read
from deployments.http.multipart import form, is_form
from deployments.http.openapi import ERRORS, describe_body
from deployments.http.rate_limits import charge_of, client_of
from deployments.schemas.uploads import CompleteRequest, PartObject, UploadList, UploadObject, UploadRequest
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from deployments.service import Service

_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {"data": {"type": "string", "format": "binary"}},
    "required": ["data"],
    "additionalProperties": False,
}
_TAKES_FORM: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def add_upload_routes(app: FastAPI, service: Service) -> None:
    """`/v1/uploads`: every answer is about the client's own. A file costs its text's tokens when it is complete."""

    @app.post("/v1/uploads", **describe_body(UploadRequest, answer=UploadObject))
    async def create(request: Request) -> UploadObject:
        return await service.uploads.create(client_of(request).tenant, await read(UploadRequest, request))

    @app.get("/v1/uploads", responses=ERRORS)
    async def list_open(request: Request) -> UploadList:
        data = (await service.uploads.list_open(client_of(request).tenant))[::-1]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return UploadList(data=data, first_id=first, last_id=last)

    @app.get("/v1/uploads/{upload_id}", responses=ERRORS)
    async def get(request: Request, upload_id: str) -> UploadObject:
        return await service.uploads.get(client_of(request).tenant, upload_id)

    @app.post("/v1/uploads/{upload_id}/parts", responses=ERRORS, openapi_extra=_TAKES_FORM)
    async def add_part(request: Request, upload_id: str) -> PartObject:
        if not is_form(request.headers):
            message = "a part comes as multipart/form-data with the field `data`"
            raise InvalidRequest(message, code="unsupported_media_type", status=415)
        async with form(request, max_fields=8) as fields:
            if unknown := fields.keys() - _FORM["properties"].keys():
                raise InvalidRequest(f"{min(unknown)}: unknown field", param=min(unknown))
            data = fields.get("data")
            if not isinstance(data, UploadFile):
                raise InvalidRequest("the form needs a field `data` with a file in it", param="data")
            part = await service.uploads.add_part(client_of(request).tenant, upload_id, await data.read())
        charge_of(request).settle(0)
        return part

    @app.post("/v1/uploads/{upload_id}/complete", **describe_body(CompleteRequest, answer=UploadObject))
    async def complete(request: Request, upload_id: str) -> UploadObject:
        body = await read(CompleteRequest, request)
        upload = await service.uploads.complete(client_of(request).tenant, upload_id, body)
        charge_of(request).settle(upload.file["rapid"]["tokens"] if upload.file else 0)
        return upload

    @app.post("/v1/uploads/{upload_id}/cancel", responses=ERRORS)
    async def cancel(request: Request, upload_id: str) -> UploadObject:
        return await service.uploads.cancel(client_of(request).tenant, upload_id)
