"""llm, the command line: a model of its extra-openai-models.yaml, streamed and whole."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import MODEL, QUESTION, V1, check, feature, greedy, main


def run(*options):
    with tempfile.TemporaryDirectory() as folder:
        known = f"- model_id: rapid\n  model_name: {MODEL}\n  api_base: {V1}\n  api_key_name: none\n"
        (Path(folder) / "extra-openai-models.yaml").write_text(known)
        command = [sys.executable, "-m", "llm", "-m", "rapid", "-o", "temperature", "0", "-o", "max_tokens", "16"]
        environment = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run([*command, *options, "--key", "none", QUESTION], capture_output=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-300:])
    return done.stdout.decode().removesuffix("\n")


@feature("chat")
def chat():
    check(run("--no-stream"), greedy())


@feature("stream")
def stream():
    check(run(), greedy())


main()
