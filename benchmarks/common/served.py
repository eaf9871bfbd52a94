"""`rapid serve` with the embedded models, for as long as a benchmark asks it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
START_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server of `serve_config.yaml` on a free port, with ``settings`` besides, and a Ray of its own.

    Yields its URL and its process, as soon as it answers.
    """
    document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    port = document["http_options"]["port"] = free_port()
    with tempfile.TemporaryDirectory(prefix="rapid-", ignore_cleanup_errors=True) as folder:
        args = document["applications"][0]["args"]
        for name, value in {"files": {"folder": f"{folder}/files"}, **settings}.items():
            args[name] = {**args.get(name, {}), **value} if isinstance(value, dict) else value
        config = Path(folder) / "serve_config.yaml"
        config.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-c", "from deployments.cli.main import main; main()", "serve", str(config)]
        environment = os.environ | {"PYTHONPATH": str(CONFIG.parent), "RAY_TMPDIR": folder}
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server)
            yield url, server
        finally:
            server.terminate()  # not SIGINT, which a shell's background jobs ignore
            server.wait(timeout=120)


@contextmanager
def served(**settings: Any) -> Iterator[str]:
    """The URL of `serving`."""
    with serving(**settings) as (url, _):
        yield url


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Returns as soon as ``server`` answers at ``url``/health; ends the process with a message if it does not."""
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"no server on {url} after {START_S} s, or it ended")
