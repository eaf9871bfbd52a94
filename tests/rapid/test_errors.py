"""Errors cross process boundaries: what arrives must say what was raised."""

import pickle

import pytest

from rapid.errors import ContextLengthExceeded, InvalidRequest, Overloaded, RapidError, SequenceClosed


@pytest.mark.parametrize(
    "error",
    [
        RapidError("broken", code="odd", status=418, param="seed"),
        InvalidRequest("no such rule", param="rapid.rule"),
        ContextLengthExceeded(prompt_tokens=9000, max_tokens=100, window=8192),
        SequenceClosed("expired"),
        Overloaded("queue full", status=429),
    ],
)
def test_an_error_survives_pickling(error: RapidError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == error.message
    assert vars(copy) == vars(error)


def test_what_an_instance_sets_is_not_shadowed_by_its_class() -> None:
    """Ray raises a subclass of the error's type that asks the real error only for what the type does not have."""
    assert not {"message", "code", "status", "param"} & set(dir(Overloaded))


def test_a_context_error_holds_its_numbers() -> None:
    error = ContextLengthExceeded(prompt_tokens=9000, max_tokens=100, window=8192)
    assert all(number in error.message for number in ("9000", "100", "8192"))
    assert (error.code, error.status, error.param) == ("context_length_exceeded", 400, "messages")
