"""Messages between processes as bytes, and back. Reading them makes values and known messages, and runs nothing else.

The format is MessagePack's. A message of `rapid.engine.messages` or `rapid.speculation.draft` is an extension with its
fields in order, an array one with dtype, shape and bytes, an error one with its class's name and its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import msgpack
import numpy as np

from rapid.engine.messages import (
    CacheView,
    DraftRequest,
    PrefillResult,
    Pulse,
    RefineRequest,
    ScoreRequest,
    ScoreResult,
    SelfDraftRequest,
    VerifyRequest,
)
from rapid.errors import RapidError
from rapid.speculation.draft import Draft, DraftLimits, Logprobs, Pairs, Transferred, Trust, VerifyResult

# What may travel. The place in the table is the type's number, and both ends are of the same version.
MESSAGES: tuple[type, ...] = (
    DraftLimits,
    DraftRequest,
    Draft,
    VerifyRequest,
    VerifyResult,
    Logprobs,
    PrefillResult,
    Pulse,
    CacheView,
    SelfDraftRequest,
    RefineRequest,
    ScoreRequest,
    ScoreResult,
    Trust,
    Transferred,
)
_TUPLE, _ARRAY, _ERROR = 100, 101, 102
_NUMBERS = "biuf"  # numpy's kinds that are no objects


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else kind._fields  # type: ignore[attr-defined]


_NAMES = {kind: _names(kind) for kind in MESSAGES}
_NUMBER = {kind: number for number, kind in enumerate(MESSAGES)}
_DISTRIBUTIONS = _NAMES[Draft].index("distributions")


def pack(value: Any) -> bytes:
    """
    Raises:
        TypeError: something in ``value`` is of a type that does not travel.
    """
    packed: bytes = msgpack.packb(value, default=_extension, strict_types=True)
    return packed


def unpack(data: bytes) -> Any:
    """
    Raises:
        ValueError: ``data`` is damaged, or of another version.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_value, strict_map_key=False)
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(f"a message is of another version: {error}") from error


def _extension(value: Any) -> Any:
    kind = type(value)
    if kind in _NUMBER:
        content = [getattr(value, name) for name in _NAMES[kind]]
        if kind is Draft:
            content[_DISTRIBUTIONS] = _columns(value.distributions)
        return msgpack.ExtType(_NUMBER[kind], pack(content))
    if kind is tuple:
        return msgpack.ExtType(_TUPLE, pack(list(value)))
    if isinstance(value, np.generic):
        return value.item()
    if kind is np.ndarray and value.dtype.kind in _NUMBERS:
        return msgpack.ExtType(_ARRAY, pack([value.dtype.str, list(value.shape), value.tobytes()]))
    if isinstance(value, RapidError):
        return msgpack.ExtType(_ERROR, pack([kind.__name__, value.__dict__]))
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} does not travel: deployments.serve.codec says what does")


def _value(number: int, data: bytes) -> Any:
    content = unpack(data)
    if number == _TUPLE:
        return tuple(content)
    if number == _ARRAY:
        return _array(*content)
    if number == _ERROR:
        return _error(*content)
    kind = MESSAGES[number]
    if kind is Draft:
        content[_DISTRIBUTIONS] = list(_pairs(*content[_DISTRIBUTIONS]))
    return kind(*content)


def _columns(distributions: list[Pairs]) -> list[Any]:
    """All pairs in two pieces: many small arrays would each have a head of their own."""
    ids = b"".join(np.asarray(tokens, "<i4").tobytes() for tokens, _ in distributions)
    probabilities = b"".join(np.asarray(chances, "<f4").tobytes() for _, chances in distributions)
    return [[len(tokens) for tokens, _ in distributions], ids, probabilities]


def _pairs(lengths: list[int], ids: bytes, probabilities: bytes) -> Iterator[Pairs]:
    tokens, chances = np.frombuffer(bytearray(ids), "<i4"), np.frombuffer(bytearray(probabilities), "<f4")
    if not sum(lengths) == len(tokens) == len(chances):
        raise ValueError("a draft's distributions are cut short")
    begin = 0
    for length in lengths:
        yield tokens[begin : begin + length], chances[begin : begin + length]
        begin += length


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind not in _NUMBERS:
        raise ValueError(f"an array of {dtype} does not travel")
    return np.frombuffer(bytearray(data), kind).reshape(shape)


def _error(name: str, attributes: dict[str, Any]) -> RapidError:
    kind = _subclass(name)
    error = kind.__new__(kind)
    Exception.__init__(error, attributes["message"])
    error.__dict__.update(attributes)
    return error


def _subclass(name: str) -> type[RapidError]:
    """The kind of error with that name; RapidError where this process has none."""
    left: list[type[RapidError]] = [RapidError]
    while left:
        kind = left.pop()
        if kind.__name__ == name:
            return kind
        left += kind.__subclasses__()
    return RapidError
