"""What the application's processes do beside their work: before they load anything else, and while they live."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable

SWITCH_INTERVAL_S = 2e-4
_TRIM_EVERY_S = 20.0


def without_pandas() -> None:
    """Imports Ray Serve with pandas hidden.

    Serve imports pandas wherever it is installed, only to encode data frames in JSON; FlagEmbedding's dependencies
    install it. That is 28 MiB and half a second in each of Serve's processes. A later import of pandas finds it.
    """
    hidden = "pandas" not in sys.modules
    if hidden:
        sys.modules["pandas"] = None  # type: ignore[assignment]  # import then raises ImportError
    try:
        import ray.serve  # noqa: F401
    finally:
        if hidden:
            del sys.modules["pandas"]


def prepare_for_streams() -> None:
    """For a process through which streams go while its threads read what strangers sent.

    A stream waits a fraction of a millisecond for the interpreter, by default five. And what the C library keeps of
    freed memory goes back to the system: the heaps are shared by all threads, and one large request after another
    would leave them as large as the largest has made them, with little in them.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        threading.Thread(target=_give_back, args=(trim,), name="give-back", daemon=True).start()


def _give_back(trim: Callable[[int], int]) -> None:
    while True:
        time.sleep(_TRIM_EVERY_S)
        trim(0)
