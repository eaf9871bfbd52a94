"""The processes that read strangers' files: few, one of a tenant, limited, and without anything of this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.files import attachments, extraction

HTML = b"<html><body>"


# In the place of the libraries that read HTML: what such a library could do if a file had taken it over.
SOUP = """
class BeautifulSoup:
    title = None
    def __init__(self, *_): pass
    def __call__(self, _): return []
"""
TAKEN_OVER = """
import json, os, resource
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)
class MarkdownConverter:
    def __init__(self, **_): pass
    def convert_soup(self, _):
        done = []
        for what in (lambda: open({path!r}, "w").write("x" * 2**20), lambda: bytearray(5 * 2**29)):
            try:
                what()
            except (OSError, MemoryError) as error:
                done.append(type(error).__name__)
        return json.dumps(done + [resource.getrlimit(limit)[0] for limit in LIMITS] + [os.nice(0)])
"""


def test_a_reader_that_a_file_takes_over_has_little_memory_and_time_and_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bs4.py").write_text(SOUP)
    (tmp_path / "markdownify.py").write_text(TAKEN_OVER.format(path=str(tmp_path / "written")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text, _ = asyncio.run(extraction.extract(HTML, timeout_s=30))
    assert json.loads(text) == ["OSError", "MemoryError", 2 * 2**30, 31, 0, 0, 19]
    assert not (tmp_path / "written").read_text()


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
