"""Results that are written after each measurement, so that a run that is cut off loses nothing and can go on."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

Result = dict[str, Any]


class OutOfTime(Exception):
    """The step's share of the time is used up."""


class Progress:
    """The results in ``path``: by step, then by measurement.

    A file of the same ``about`` (device, versions, commit) is continued: what it has is not measured again, but errors
    are. No measurement begins after ``limit_s`` seconds. One that does not come back within ``grace_s`` more, a hung
    kernel say, ends the process with status 3.
    """

    def __init__(self, path: Path, about: Result, limit_s: float, grace_s: float = 20.0) -> None:
        self.path, self._end = path, time.monotonic() + limit_s
        self._step, self._step_end = "", self._end
        self.results: Result = {"about": about, "steps": {}}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before.get("about") == about:
                self.results = before
        self._watchdog = threading.Timer(limit_s + grace_s, self._give_up)
        self._watchdog.daemon = True
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.cancel()

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    @contextmanager
    def step(self, name: str, share_s: float) -> Iterator[None]:
        """One step, which gets at most ``share_s`` seconds. What its time does not suffice for is named."""
        self._step, self._step_end = name, min(self._end, time.monotonic() + share_s)
        self.results["steps"].setdefault(name, {})
        print(f"\n{name}", flush=True)
        try:
            yield
        except OutOfTime:
            print("  out of time; run again to go on", flush=True)
        except Exception as error:
            self._keep("failed", {"error": _told(error)})
        else:
            self.results["steps"][name].pop("failed", None)
            self._write()

    def measure(self, name: str, measurement: Callable[[], Result]) -> Result:
        """The result of ``measurement``, measured now unless it is known. An error is a result: ``{"error": …}``.

        Raises:
            OutOfTime: the step's time is over.
        """
        known: Result = self.results["steps"][self._step].get(name, {"error": "not run"})
        if "error" not in known:
            return known
        if time.monotonic() > self._step_end:
            raise OutOfTime
        try:
            result = measurement()
        except Exception as error:
            result = {"error": _told(error)}
        return self._keep(name, result)

    def _keep(self, name: str, result: Result) -> Result:
        result = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in result.items()}
        self.results["steps"][self._step][name] = result
        print(f"  {name}: {json.dumps(result)}", flush=True)
        self._write()
        return result

    def _write(self) -> None:
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)

    def _give_up(self) -> None:
        print(f"  {self._step}: a measurement did not end in time", flush=True)
        os._exit(3)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
