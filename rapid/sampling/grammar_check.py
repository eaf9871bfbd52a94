"""Tries a grammar in a process of its own, before it is given to a process that others need.

A schema that its author made for it overflows the stack of the compiler, or takes all memory. Run as a program (by its
path, so that nothing else is imported), this module reads a grammar from stdin, compiles it within limits of memory,
time and stack, and writes what is wrong with it; nothing where it is right.
"""

import hashlib
import resource
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000  # of a schema, as JSON
MAX_DEPTH = 64
MAX_REFERENCES = 256
_MEMORY_BYTES = 2**30
_SECONDS = 5
# Less than any thread has in which the grammar is compiled later: what fits here fits there.
_STACK_BYTES = 2**20
_MAX_KNOWN = 4096

_known: OrderedDict[bytes, str] = OrderedDict()


def fault_of_schema(schema: Mapping[str, Any], num_bytes: int) -> str:
    """Why a schema of ``num_bytes`` is not even tried; empty where it may be."""
    if num_bytes > MAX_BYTES:
        return f"it has {num_bytes} bytes, and at most {MAX_BYTES} are read"
    depth, references, level = 0, 0, [schema]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return f"it is nested deeper than {MAX_DEPTH} levels"
        inner: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                references += "$ref" in value
                inner += value.values()
            elif isinstance(value, Sequence) and not isinstance(value, str):
                inner += value
        level = inner
    return f"it has {references} $refs, and at most {MAX_REFERENCES} are read" if references > MAX_REFERENCES else ""


def fault_of_grammar(grammar: str, library: Path) -> str:
    """What is wrong with a grammar; empty where it is right. What was tried before is not tried again.

    Args:
        library: the folder from which llguidance is imported.
    """
    digest = hashlib.sha256(grammar.encode("utf-8", "replace")).digest()
    if digest not in _known:
        _known[digest] = _tried(grammar, library)
        while len(_known) > _MAX_KNOWN:
            _known.popitem(last=False)
    return _known[digest]


def _tried(grammar: str, library: Path) -> str:
    try:
        tried = subprocess.run(
            [sys.executable, "-S", "-P", __file__],
            input=grammar.encode("utf-8", "replace"),
            capture_output=True,
            timeout=2 * _SECONDS,
            env={"PYTHONPATH": str(library)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if tried.returncode:
        return "it takes too much memory, time or depth to compile"
    return tried.stdout.decode("utf-8", "replace")


def main() -> None:
    grammar = sys.stdin.buffer.read().decode()
    with suppress(ValueError, OSError):  # some systems refuse it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, args=(grammar,))
    thread.start()
    thread.join()


def _compile(grammar: str) -> None:
    from llguidance import LLMatcher

    sys.stdout.write(LLMatcher.validate_grammar(grammar))


if __name__ == "__main__":
    main()
