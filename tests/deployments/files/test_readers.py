"""The processes that read strangers' files: few, one of a tenant, and without anything of this process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.files import attachments, extraction

HTML = b"<html><body>"


def test_a_reader_sees_no_variable_and_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAPID_API_KEYS", "secret")
    reader = tmp_path / "reader.py"
    reader.write_text("import json, os\nprint(json.dumps({'text': ' '.join(os.environ)}))")
    monkeypatch.setattr(extraction, "__file__", str(reader))
    text, _ = asyncio.run(extraction.extract(HTML, timeout_s=30))
    assert set(text.split()) <= {"PYTHONPATH", "LC_CTYPE"}


def test_the_limits_hold_for_the_real_reader() -> None:
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
