"""Requests that no engine gets any more for some minutes: engine after engine was lost with them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from rapid.engine.messages import SequenceRequest
from rapid.errors import RequestQuarantined

MAX_RESUMPTIONS = 2  # without a token in between; then it may be the request that ends engines
QUARANTINE_S = 300.0
_MOST = 1024  # the oldest is dropped for one more


class Quarantine:
    """Remembers requests by what an engine reads of them: the prompt, and how its logits are adjusted.

    Of a prompt that is scored, all behind the first tokens is ``scored``: the engine reads it, and the sequence is
    opened without it.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def check(self, request: SequenceRequest, scored: Sequence[int] = ()) -> None:
        """
        Raises:
            RequestQuarantined: the request was added less than `QUARANTINE_S` ago.
        """
        if not self._until:  # as good as always: no fingerprint is computed
            return
        left_s = self._until.get(_fingerprint(request, scored), 0.0) - time.monotonic()
        if left_s > 0:
            raise RequestQuarantined(
                f"this prompt is refused for another {left_s:.0f} s: {MAX_RESUMPTIONS + 1} engines were lost "
                "one after another while they worked on it. Change the prompt, or report it to the operator."
            )

    def add(self, request: SequenceRequest, scored: Sequence[int] = ()) -> RequestQuarantined:
        """From now on ``request`` is refused; returns the error for the request itself."""
        self._until = {name: until for name, until in self._until.items() if until > time.monotonic()}
        while len(self._until) >= _MOST:
            del self._until[next(iter(self._until))]
        self._until[_fingerprint(request, scored)] = time.monotonic() + QUARANTINE_S
        return RequestQuarantined(
            f"{MAX_RESUMPTIONS + 1} engines were lost one after another without a token in between while they worked "
            f"on this request; it is refused for {QUARANTINE_S:.0f} s"
        )


def _fingerprint(request: SequenceRequest, scored: Sequence[int]) -> str:
    read = [*request.prompt[: len(request.prompt) - request.written], *scored]
    return hashlib.sha256(repr((read, request.logits)).encode()).hexdigest()
