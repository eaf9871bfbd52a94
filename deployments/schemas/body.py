"""The base of all bodies that clients send: it is strict, and null counts as absent."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

BELONGS = "belongs"


def wrong(field: str, why: str) -> PydanticCustomError:
    """The error that a validator of a whole body raises about one field, or about the body where ``field`` is empty."""
    return PydanticCustomError(BELONGS, "{why}", {"field": field, "why": why})


class Body(BaseModel):
    """A body, or an object in one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the client sent."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}
