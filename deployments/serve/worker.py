"""What the application's processes do beside their work: before they load anything else, and while they live."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

SWITCH_INTERVAL_S = 2e-4
_GIVE_BACK_EVERY_S = 20.0


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

    A stream waits a fraction of a millisecond for the interpreter, by default five.

    Memory goes back to the system every `_GIVE_BACK_EVERY_S`. A request that failed is a cycle (its error has the
    traceback, whose frames have the error), and so its body stays until the oldest objects are looked through, which
    Python does when there are a quarter more of them. Serve has frozen those of the start, so that takes milliseconds.
    And the C library keeps what is freed: one large request after another would leave its heaps as large as the largest
    has made them, with little in them.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # glibc's
    threading.Thread(target=_give_back, args=(trim,), name="give-back", daemon=True).start()


def _give_back(trim: Callable[[int], int]) -> None:
    while True:
        time.sleep(_GIVE_BACK_EVERY_S)
        if gc.get_freeze_count():  # else it looks through all that was ever loaded, for seconds
            gc.collect()
        trim(0)
