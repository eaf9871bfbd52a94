"""A gate before a model's forward pass."""

import threading
from typing import Any

import pytest

from rapid.models.model import Model


class Gate:
    """Stands before a model's forward pass: holds it until told, and notes how many tokens each pass had."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[int]] = []
        self._arrived, self._may_go = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        forward = model.forward

        def gated(entries: Any, **options: Any) -> Any:
            self.passes.append([len(tokens) for _, tokens, _ in entries])
            self._arrived.release()
            if not self._open:
                assert self._may_go.acquire(timeout=30)
            return forward(entries, **options)

        monkeypatch.setattr(model, "forward", gated)

    def wait(self) -> None:
        """Until the engine is about to run a pass."""
        assert self._arrived.acquire(timeout=30)

    def step(self) -> None:
        """Lets the waiting pass go, and waits for the next."""
        self._may_go.release()
        self.wait()

    def close(self) -> None:
        """Holds all passes to come."""
        while self._arrived.acquire(blocking=False) or self._may_go.acquire(blocking=False):
            pass
        self._open = False

    def open(self) -> None:
        """Lets this pass and all to come go."""
        self._open = True
        self._may_go.release()
