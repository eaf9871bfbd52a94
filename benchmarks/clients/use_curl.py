"""curl with an offer of HTTP/2, as it makes it unasked behind some proxies."""

import json
import subprocess

from harness import MESSAGES, MODEL, V1, check, feature, greedy, main

BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}


def run(body):
    command = ["curl", "-sS", "--http2", "--max-time", "60", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(body), f"{V1}/chat/completions"], capture_output=True, check=True)
    return done.stdout.decode()


@feature("chat")
def chat():
    check(json.loads(run(BODY))["choices"][0]["message"]["content"], greedy())


@feature("stream")
def stream():
    chunks = [json.loads(line[6:]) for line in run({**BODY, "stream": True}).splitlines() if line[:7] == "data: {"]
    check("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), greedy())


main()
