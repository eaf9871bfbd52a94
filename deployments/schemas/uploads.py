"""The bodies of OpenAI's `/v1/uploads`, by which a file comes in parts, and the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from deployments.files.records import LEAST_EXPIRY_S, MOST_EXPIRY_S, PURPOSES
from deployments.schemas.body import MAX_NAME, AtMost, Body

MAX_PARTS = 2_000  # of one upload


class ExpiresAfter(Body):
    """When the file is to expire."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_EXPIRY_S, le=MOST_EXPIRY_S)


class UploadRequest(Body):
    """`POST /v1/uploads`: what the file will be."""

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=MAX_NAME)
    mime_type: str = Field(max_length=MAX_NAME, description="without effect: what is in a file decides what it is")
    purpose: str = Field(json_schema_extra={"enum": list(PURPOSES)})
    expires_after: ExpiresAfter | None = None

    @field_validator("purpose")
    @classmethod
    def _is_known(cls, purpose: str) -> str:
        if purpose not in PURPOSES:
            raise PydanticCustomError("purpose", "must be one of {known}", {"known": ", ".join(PURPOSES)})
        return purpose


class CompleteRequest(Body):
    """`POST /v1/uploads/{id}/complete`: the parts in their order."""

    part_ids: Annotated[list[str], AtMost(MAX_PARTS)]
    md5: str | None = Field(None, max_length=MAX_NAME, description="of the whole file, in hexadecimal digits")


class UploadObject(BaseModel):
    """OpenAI's upload; ``file`` is the file object once there is one."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: dict[str, Any] | None = None


class PartObject(BaseModel):
    """OpenAI's part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class UploadList(BaseModel):
    """The client's open uploads, the newest first."""

    object: Literal["list"] = "list"
    data: list[UploadObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = False
