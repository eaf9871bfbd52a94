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

START_S = 240


@contextmanager
def served(**settings: Any) -> Iterator[str]:
    """The server of `serve_config.yaml` on a free port, with ``settings`` besides; yields its URL."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        document = yaml.safe_load(Path("serve_config.yaml").read_text())
        document["http_options"]["port"] = port
        args = document["applications"][0]["args"]
        for name, value in {"files": {"folder": f"{folder}/files"}, **settings}.items():
            args[name] = {**args.get(name, {}), **value} if isinstance(value, dict) else value
        config = Path(folder) / "serve_config.yaml"
        config.write_text(yaml.safe_dump(document))
        probe.close()
        command = [sys.executable, "-c", "from deployments.cli.main import main; main()", "serve", str(config)]
        server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=120)


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
