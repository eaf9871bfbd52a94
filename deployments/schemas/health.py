"""The answer of `GET /health`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Health(BaseModel):
    """`GET /health`: by role the model, open sequences, the bytes their KV caches hold, and the age of the oldest pass.

    With ``problems`` (part → what is wrong, of the parts that requests can do without) ``status`` is "degraded".
    """

    status: Literal["ok", "degraded"]
    models: dict[str, str]
    sequences: dict[str, int]
    kv_bytes: dict[str, int]
    pass_age_s: dict[str, float]
    problems: dict[str, str]
