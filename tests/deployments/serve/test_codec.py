"""Every message of a lease arrives as it was, and nothing else is made of bytes."""

from __future__ import annotations

import math
import pickle
import random
from contextlib import suppress
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
import pytest

from deployments.serve.codec import MESSAGES, pack, unpack
from rapid.engine.lease import CALLS, LeasedSequence
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
from rapid.errors import ContextLengthExceeded, EngineLost, Overloaded, RapidError
from rapid.speculation.draft import Draft, DraftLimits, Logprobs, Transferred, Trust, VerifyResult, certain_draft

PAIRS = [(np.arange(k, dtype=np.int32), np.full(k, 1 / k, np.float32)) for k in (1, 3, 64)]
DRAFT = Draft(7, [1, 2, 3], PAIRS, [0.25, 0.5, 0.75], 1.5, 0.5, 2)
LIMITS = DraftLimits(9, 0.125, (0.5, 0.25), True)
LOGPROBS = Logprobs(-0.5, [(3, -0.5), (4, -1.5)])
VERDICT = VerifyResult([1, 2], 3, 1, 1, [0.5, 0.25, 0.125], 1.0, 2.0, 3.0, [LOGPROBS, LOGPROBS])
VIEW = CacheView("snap", 256)
SAMPLES: list[Any] = [
    LIMITS,
    DraftRequest(2, [5, 6], LIMITS),
    DRAFT,
    certain_draft(0, []),
    VerifyRequest(DRAFT, True),
    VERDICT,
    LOGPROBS,
    PrefillResult(12, 3.5),
    Pulse(0.5, None),
    VIEW,
    SelfDraftRequest(3, LIMITS, VIEW),
    RefineRequest(DRAFT, [1, 2], VIEW),
    ScoreRequest([1, 2, 3]),
    ScoreResult([-0.5, -1.0], [1, 3], [[(7, -0.5)], [(8, -0.25)]]),
    VerifyRequest(DRAFT, True, Trust(0.5, 0.25)),
    Trust(0.5, 0.75),
    Transferred(0.5, 2.0, 3.0, 0.25, 0.5, 0.75),
    [1, None, (True, b"bytes", {"a": [1, 2.5], 3: ()})],
]


def same(a: Any, b: Any) -> bool:
    """Arrays by their bytes, and everything by its type, too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) in MESSAGES:
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool(a == b)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_message_arrives_as_it_was(sample: Any) -> None:
    assert same(unpack(pack(sample)), sample)


def test_every_kind_of_message_is_tried_above_and_none_is_missing() -> None:
    """What a lease's calls take and return has to be in the table."""
    assert {type(sample) for sample in SAMPLES} >= set(MESSAGES)
    known = {kind.__name__ for kind in MESSAGES}
    for name in CALLS:
        for annotation in getattr(LeasedSequence, name).__annotations__.values():
            words = annotation.replace("Awaitable[", "").replace("]", "").split(" | ")
            assert set(words) - {"None"} <= known, (name, annotation)


def test_arrays_may_be_written_to_as_those_that_never_travelled() -> None:
    arrived = unpack(pack(DRAFT))
    arrived.distributions[2][1][:] = 0
    assert arrived.distributions[0][1][0] == 1


def test_arrays_of_every_shape_of_numbers_arrive() -> None:
    for array in (np.zeros((0, 3), np.int64), np.arange(6.0).reshape(2, 3).T, np.array([True]), np.float32(0.1)):
        back = unpack(pack(array))
        assert same(back, array) or back == float(array)
    with pytest.raises(TypeError):
        pack(np.array([object()]))


def test_errors_arrive_with_all_that_they_know() -> None:
    for error in (
        Overloaded("full", status=429),
        EngineLost("gone", code="other", param="x"),
        ContextLengthExceeded(prompt_tokens=9, max_tokens=1, window=8),
    ):
        back = unpack(pack(error))
        assert type(back) is type(error) and back.__dict__ == error.__dict__ and str(back) == str(error)
    unknown = unpack(pack(Overloaded("full")).replace(b"Overloaded", b"Overlord!!"))
    assert type(unknown) is RapidError and unknown.code == "overloaded"


def test_what_is_not_in_the_table_does_not_travel() -> None:
    for value in (object(), {1, 2}, lambda: 1, ValueError("x"), [math], (DRAFT, print)):
        with pytest.raises(TypeError, match="does not travel"):
            pack(value)


def test_no_bytes_make_anything_else() -> None:
    """Damaged messages and others' formats are refused, or are values."""
    objects, text = (msgpack.ExtType(101, msgpack.packb([kind, [1], bytes(8)])) for kind in ("|O", "<U2"))
    cut = msgpack.ExtType(2, msgpack.packb([0, [1], [[5], b"", b""], [0.5], 0.0, 0.0, 0]))
    unknown = msgpack.ExtType(99, b"\x90")
    for data in (*map(msgpack.packb, (objects, text, cut, unknown)), b"", b"\xc1"):
        with pytest.raises(ValueError):
            unpack(data)
    rng = random.Random(0)
    whole = pack(SAMPLES)
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with suppress(ValueError):
            unpack(bytes(damaged[: rng.randrange(len(damaged) + 1)]))
    with pytest.raises(ValueError):
        unpack(pickle.dumps(DRAFT))
