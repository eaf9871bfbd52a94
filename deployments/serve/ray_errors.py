"""What Ray and Serve raise when a part of the application is gone, silent or busy: understood here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.serve.exceptions import BackPressureError, RayServeException

from rapid.errors import Overloaded, RapidError

# The first that fits; each has subclasses, and an error may be of several kinds.
_WORDS: list[tuple[type[Exception], str]] = [
    (TimeoutError, "did not answer in time"),  # asyncio's, and GetTimeoutError
    (OutOfMemoryError, "was ended because its machine had no memory left"),
    (NodeDiedError, "was on a machine that is gone"),
    (ActorUnavailableError, "cannot be reached"),
    (RayActorError, "is gone"),
    (RayTaskError, "failed"),
    (RayServeException, "has no replica that answers"),
    (RayError, "is gone"),
]


@contextmanager
def understood(part: str, lost: Callable[[str], RapidError]) -> Iterator[None]:
    """Raises an error about ``part`` as ``lost`` with a reason in words. A RapidError passes: it came from the part.

    Raises:
        Overloaded: the queue of ``part`` is full (429).
    """
    try:
        yield
    except RapidError:  # of another process: Ray raises these as errors of its own, too
        raise
    except BackPressureError as error:
        raise Overloaded(f"the queue of {part} is full; try again shortly", status=429) from error
    except (TimeoutError, RayError, RayServeException) as error:
        raise lost(f"{part} {next(words for kind, words in _WORDS if isinstance(error, kind))}") from error
