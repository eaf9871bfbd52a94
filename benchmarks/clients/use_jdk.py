"""The JDK's HttpClient, which offers HTTP/2 with its first request: Spring AI and LangChain4j stand on it."""

import json
import subprocess
from pathlib import Path

from harness import MESSAGES, MODEL, V1, check, feature, greedy, main

BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}


def run(body):
    source = Path(__file__).with_name("Ask.java")
    command = ["java", str(source), f"{V1}/chat/completions", json.dumps(body)]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()


@feature("chat")
def chat():
    check(json.loads(run(BODY))["choices"][0]["message"]["content"], greedy())


@feature("stream")
def stream():
    chunks = [json.loads(line[6:]) for line in run({**BODY, "stream": True}).splitlines() if line[:7] == "data: {"]
    check("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), greedy())


main()
