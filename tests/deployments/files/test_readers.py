"""The processes that read strangers' files: few, one of a tenant, limited, and without anything of this process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import platform
import socket
from pathlib import Path
from typing import Any

import pytest

from deployments.files import attachments, extraction

HTML = b"<html><body>"


def landlock_version() -> int:
    """0 or less where the kernel has none."""
    version: int = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
    return version


# In the place of the libraries that read HTML: what such a library could do if a file had taken it over.
SOUP = """
class BeautifulSoup:
    title = None
    def __init__(self, *_): pass
    def __call__(self, _): return []
"""
TAKEN_OVER = """
import ctypes, json, os, resource, signal, socket, threading
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)
FOLDER = {folder!r}

def attempt(what):
    try:
        return str(what())
    except (OSError, MemoryError) as error:
        return type(error).__name__

def of_parent(name):
    return open(f"/proc/{{os.getppid()}}/{{name}}", "rb").read()

ATTEMPTS = dict(
    memory=lambda: bytearray(5 * 2**29),
    write=lambda: open(FOLDER + "/written", "w").write("x"),
    stand_in=lambda: os.rename(FOLDER + "/theirs", FOLDER + "/kernel.o"),
    link=lambda: os.symlink(FOLDER + "/theirs", FOLDER + "/kernel.o"),
    remove=lambda: os.unlink(FOLDER + "/theirs"),
    mode=lambda: os.chmod(FOLDER + "/theirs", 0o777),
    read=lambda: open(FOLDER + "/theirs").read(),
    listing=lambda: os.listdir(FOLDER),
    keys=lambda: of_parent("environ"),
    connect=lambda: socket.create_connection(("127.0.0.1", {port}), timeout=5),
    send=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    program=lambda: os.execv("/bin/true", ["true"]),
    fork=lambda: os.fork() or os._exit(0),
    end=lambda: os.kill(os.getppid(), 0),
    limit=lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)),
)

class MarkdownConverter:
    def __init__(self, **_): pass
    def convert_soup(self, _):
        done = {{name: attempt(what) for name, what in ATTEMPTS.items()}}
        thread = threading.Thread(target=lambda: done.update(threads="start"))
        thread.start()
        thread.join()
        limits = [resource.getrlimit(limit)[0] for limit in LIMITS]
        return json.dumps(done | dict(limits=limits, priority=os.getpriority(os.PRIO_PROCESS, 0)))
"""


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a reader could still do."""
    (tmp_path / "theirs").write_text("secret")
    (tmp_path / "bs4.py").write_text(SOUP)
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = TAKEN_OVER.format(folder=str(tmp_path), port=server.getsockname()[1])
        (tmp_path / "markdownify.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        text, _ = asyncio.run(extraction.extract(HTML, timeout_s=30))
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "bs4.py", "markdownify.py"}
    done: dict[str, Any] = json.loads(text)
    return done


def test_a_reader_that_a_file_takes_over_has_little_memory_time_and_priority(taken_over: dict[str, Any]) -> None:
    assert taken_over["memory"] == "MemoryError"
    assert taken_over["limits"] == [2 * 2**30, 31, 0, 0]
    assert taken_over["priority"] == 19


@pytest.mark.skipif(landlock_version() < 6, reason="this kernel's Landlock does not bound all of it")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter of system calls is for x86-64")
def test_a_reader_that_a_file_takes_over_reaches_nothing(taken_over: dict[str, Any]) -> None:
    outside = taken_over.keys() - {"memory", "limits", "priority", "threads"}
    assert {taken_over[name] for name in outside} == {"PermissionError"}, taken_over
    assert taken_over["threads"] == "start"


def test_what_a_system_cannot_take_from_readers_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = tmp_path / "reader.py"
    reader.write_text('print(\'{"text": "t", "missing": ["Landlock", "filter of system calls"]}\')')
    monkeypatch.setattr(extraction, "__file__", str(reader))
    for _ in range(2):
        asyncio.run(extraction.extract(HTML, timeout_s=30))
    assert [record.getMessage() for record in caplog.records] == [
        "this system has no Landlock and no filter of system calls: what reads a stranger's file may reach other "
        "files, or the network"
    ]


def test_a_reader_sees_no_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAPID_API_KEYS", "secret")
    reader = tmp_path / "reader.py"
    reader.write_text("import json, os\nprint(json.dumps({'text': ' '.join(os.environ)}))")
    monkeypatch.setattr(extraction, "__file__", str(reader))
    text, _ = asyncio.run(extraction.extract(HTML, timeout_s=30))
    assert set(text.split()) <= {"PYTHONPATH", "LC_CTYPE"}


def test_a_page_is_read_within_the_limits() -> None:
    page = b"<html><head><title>A</title></head><body><p>Some text.</p></body></html>"
    assert asyncio.run(extraction.extract(page, timeout_s=60)) == ("A\n\nSome text.", "text/html")


def test_two_files_are_read_at_once_and_one_of_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    most: list[list[str]] = []

    async def extract(data: bytes, **_: Any) -> tuple[str, str]:
        running.append(data.decode())
        most.append(sorted(running))
        for _ in range(3):
            await asyncio.sleep(0)
        running.remove(data.decode())
        return "", ""

    async def story() -> None:
        tenants = ["a"] * 4 + ["b"] * 2 + ["c"]
        reading = (attachments.extract_text(t.encode(), "", t, timeout_s=1, param="file") for t in tenants)
        await asyncio.gather(*reading)

    monkeypatch.setattr(attachments, "extract", extract)
    monkeypatch.setattr(attachments, "_places", asyncio.Semaphore(2))
    asyncio.run(story())
    assert max(map(len, most)) == 2 and len(most) == 7
    assert all(len(set(together)) == len(together) for together in most)
