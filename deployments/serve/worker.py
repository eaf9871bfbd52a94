"""What every process of the application does before it loads anything else."""

from __future__ import annotations

import sys


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
