"""The base of all bodies that clients send: it is strict, bounded in what it says of its errors, and null is absent."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

BELONGS = "belongs"
MAX_NAME = 256  # characters of a name
MAX_TOKENS = 2**21  # of a list of tokens


def wrong(field: str, why: str) -> PydanticCustomError:
    """The error that a validator of a whole body raises about one field, or about the body where ``field`` is empty."""
    return PydanticCustomError(BELONGS, "{why}", {"field": field, "why": why})


class Body(BaseModel):
    """A body, or an object in one.

    Lists in it stop at their first wrong item (`AtMost`), and an object at its first unknown field: a body of a
    million errors would else become a million objects.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if unknown := next((name for name in data if name not in known), None):
            raise wrong(unknown[:MAX_NAME], "unknown field")
        return {k: v for k, v in data.items() if v is not None}

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the client sent."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}


@dataclass(frozen=True)
class AtMost:
    """Annotates a list or a dict of at most ``number`` items, which is read up to its first wrong item."""

    number: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            return {**schema, "fail_fast": True, "max_length": self.number}
        # pydantic reads all of a dict, whatever is wrong in it.
        return core_schema.no_info_before_validator_function(self._check, schema)

    def _check(self, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > self.number:
            raise PydanticCustomError("too_many", "must have at most {number} entries", {"number": self.number})
        return data
