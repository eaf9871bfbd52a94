"""OpenAI's routes for files, and RAPID's own `warm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from starlette.datastructures import FormData, UploadFile

from deployments.files.records import LEAST_EXPIRY_S, MOST_EXPIRY_S, PURPOSES
from deployments.http.listing import listed
from deployments.http.multipart import form, is_form
from deployments.http.openapi import ERRORS
from deployments.http.rate_limits import charge_of, client_of
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from deployments.files.files import Files

# The route reads the form itself: a file may be large, and errors have OpenAI's shape.
_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES), "default": PURPOSES[0]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": LEAST_EXPIRY_S, "maximum": MOST_EXPIRY_S},
    },
    "required": ["file"],
    "additionalProperties": False,
}
_TAKES_FORM: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def add_file_routes(app: FastAPI, files: Files) -> None:
    """`/v1/files`: every answer is about the client's own files."""

    @app.post("/v1/files", responses=ERRORS, openapi_extra=_TAKES_FORM)
    async def upload(request: Request) -> dict[str, Any]:
        if not is_form(request.headers):
            message = "a file comes as multipart/form-data with the fields `file` and `purpose`"
            raise InvalidRequest(message, code="unsupported_media_type", status=415)
        async with form(request, max_fields=8) as fields:
            if unknown := fields.keys() - _FORM["properties"].keys():
                raise InvalidRequest(f"{min(unknown)}: unknown field", param=min(unknown))
            file, purpose = fields.get("file"), fields.get("purpose", PURPOSES[0])
            if not isinstance(file, UploadFile):
                raise InvalidRequest("the form needs a field `file` with a file in it", param="file")
            stored = await files.upload(
                client_of(request).tenant, file.filename or "file", str(purpose), await file.read(), _expiry(fields)
            )
            charge_of(request).settle(stored["rapid"]["tokens"])
            return stored

    @app.get("/v1/files", responses=ERRORS)
    async def list_files(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        purpose: str | None = None,
    ) -> dict[str, Any]:
        every = await files.list_files(client_of(request).tenant)
        found = [file for file in every if purpose in (None, file["purpose"])]
        if order == "desc":
            found.reverse()
        return listed(found, limit, after, "file")

    @app.get("/v1/files/{file_id}", responses=ERRORS)
    async def get(request: Request, file_id: str) -> dict[str, Any]:
        return await files.get(client_of(request).tenant, file_id)

    @app.get("/v1/files/{file_id}/content", responses=ERRORS)
    async def content(request: Request, file_id: str) -> Response:
        filename, data = await files.content(client_of(request).tenant, file_id)
        # A browser saves the file, whatever is in it, and does not show it as a page of this site.
        headers = {
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(data, media_type="application/octet-stream", headers=headers)

    @app.delete("/v1/files/{file_id}", responses=ERRORS)
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        await files.delete(client_of(request).tenant, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @app.post("/v1/files/{file_id}/warm", responses=ERRORS)
    async def warm(request: Request, file_id: str) -> dict[str, Any]:
        warmed = await files.warm(client_of(request).tenant, file_id)
        charge_of(request).settle(warmed["prompt_tokens"])
        return warmed


def _expiry(fields: FormData) -> int | None:
    """After how many seconds the upload is to expire, if it says so.

    Raises:
        InvalidRequest: only one of the two fields is there, or it is wrong.
    """
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest('a file expires after its "created_at"', param="expires_after[anchor]")
    if not str(seconds).isdecimal() or not LEAST_EXPIRY_S <= int(str(seconds)[:9]) <= MOST_EXPIRY_S:
        limits = f"give {LEAST_EXPIRY_S} to {MOST_EXPIRY_S} seconds"
        raise InvalidRequest(limits, param="expires_after[seconds]")
    return int(str(seconds))
