"""The base of all bodies that clients send: it is strict, bounded in what it says of its errors, and null is absent."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from deployments.schemas.ignored import NOTHING, Ignorable, fault

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

    ignores: ClassVar[Ignorable] = NOTHING  # fields that have no effect (`deployments.schemas.ignored`)
    limits: ClassVar[frozenset[str]] = frozenset()  # fields in which -1 means that there is no limit
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _null_is_absent(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept, ignored = {}, []
        for name, value in data.items():
            if name in known:
                if value is not None and not (name in cls.limits and value == -1):
                    kept[name] = value
            elif name not in cls.ignores:
                raise wrong(name[:MAX_NAME], "unknown field")
            elif value is not None:
                if why := fault(name, value, cls.ignores[name]):
                    raise wrong(name, why)
                ignored.append(name)
        body = handler(kept)
        body._ignored = ignored
        return body

    @property
    def ignored(self) -> list[str]:
        """The fields that the client sent and that have no effect, here and in what this body holds."""
        inner = {
            f"{name}.{field}": None
            for name in self.model_fields_set
            for item in _listed(getattr(self, name))
            if isinstance(item, Body)
            for field in item.ignored
        }
        return sorted([*self._ignored, *inner])

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the client sent."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
