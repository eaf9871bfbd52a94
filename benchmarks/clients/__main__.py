"""Popular clients, unmodified and at pinned versions, against a server: a table of client by feature.

The clients live in environments of their own (`.venv-clients`), made from `requirements.txt`, or from a client's own
where it goes with no other. The server is `rapid serve` with the embedded models, the target in float32, unless `--url`
names one. What lm-eval measures is compared with transformers' own numbers.
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.results import FOLDER, write
from benchmarks.common.served import served
from rapid.weights.embedded_models import local_path

HERE = Path(__file__).parent
ENVIRONMENTS = Path(".venv-clients")
MODEL = "smollm2-135m-instruct"
CLIENTS = {  # script → packages whose versions are told, or the program that must be there
    "openai": ["openai"],
    "anthropic": ["anthropic"],
    "langchain": ["langchain-openai"],
    "llama_index": ["llama-index-llms-openai-like"],
    "litellm": ["litellm"],
    "pydantic_ai": ["pydantic-ai-slim"],
    "instructor": ["instructor"],
    "openai_agents": ["openai-agents"],
    "outlines": ["outlines"],
    "llm": ["llm"],
    "lm_eval": ["lm-eval"],
    "curl": [],
    "jdk": [],
}
PROGRAMS = {"curl": ["curl", "--version"], "jdk": ["java", "--version"]}
CLIENT_S = 300


def install(name: str) -> Path:
    """The interpreter of a client's environment, which is made where it is missing. Most clients share one."""
    apart = HERE / f"requirements_{name}.txt"
    requirements = apart if apart.exists() else HERE / "requirements.txt"
    environment = ENVIRONMENTS / requirements.stem
    python, stamp = environment / "bin" / "python", environment / "installed.txt"
    pins = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "-r", requirements], check=True)
        stamp.write_text(pins)
    return python.absolute()


def run(name: str, python: Path, url: str) -> list[dict[str, Any]]:
    """What the script of one client tells of its features."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OPENAI_API_KEY")}
    environment |= {"RAPID_URL": url, "RAPID_MODEL": MODEL, "RAPID_TOKENIZER": str(local_path(MODEL))}
    try:
        script = [python, HERE / f"use_{name}.py"]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        return [{"feature": "all", "ok": False, "error": f"not done after {CLIENT_S} s"}]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature"')]
    if done.returncode:
        told.append({"feature": "all", "ok": False, "error": done.stderr.strip().splitlines()[-1][:300]})
    return told


def version(name: str, python: Path) -> str | None:
    """The client's version; None where the client is not there."""
    if name in PROGRAMS:
        if shutil.which(PROGRAMS[name][0]) is None:
            return None
        said = subprocess.run(PROGRAMS[name], capture_output=True, text=True, check=True).stdout
        return said.splitlines()[0].partition(" (")[0]
    asked = f"import importlib.metadata as m; print(*(m.version(p) for p in {CLIENTS[name]!r}))"
    said = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    return f"{CLIENTS[name][0]} {said.stdout.strip()}" if said.returncode == 0 else None


def compared(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of lm-eval's log-likelihoods from transformers' own; whether the texts are the same."""
    folder = local_path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {each["feature"]: each.get("saw", []) for each in told}
    worst: float | None = None
    for context, continuation, value in found.get("log-likelihoods", []):
        before, whole = (tokenizer.encode(text) for text in (context, context + continuation))
        with torch.inference_mode():
            logits = network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        own = sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))
        worst = max(worst or 0.0, abs(own - value))
    same = []
    for prompt, text in found.get("generation", []):
        ids = torch.tensor([tokenizer.encode(prompt)])
        written = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        own_text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).partition("\n\n")[0]
        same.append(own_text == text)
    return {"log_likelihood_max_difference": worst, "generated_as_transformers": same}


def table(results: dict[str, Any]) -> str:
    """Client by feature, in Markdown."""
    features = list(dict.fromkeys(each["feature"] for client in results.values() for each in client["features"]))
    lines = ["| client | " + " | ".join(features) + " |", "| --- |" + " --- |" * len(features)]
    reasons = []
    for name, client in results.items():
        by_feature = {each["feature"]: each for each in client["features"]}
        cells = [{True: "yes", False: "**no**"}.get(by_feature.get(f, {}).get("ok"), "") for f in features]
        lines.append(f"| {client['version'] or f'{name}: not installed'} | " + " | ".join(cells) + " |")
        reasons += [f"* {name}, {e['feature']}: {e['error']}" for e in client["features"] if not e["ok"]]
    return "\n".join([*lines, "", *reasons]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server with the embedded model")
    parser.add_argument("--only", nargs="*", choices=CLIENTS, default=list(CLIENTS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    pythons = {name: install(name) for name in options.only}
    with nullcontext(options.url) if options.url else served(target={"dtype": "float32"}) as url:
        for name in options.only:
            found = version(name, pythons[name])
            results[name] = {"version": found, "features": run(name, pythons[name], url) if found else []}
            for each in results[name]["features"]:
                print(name, each["feature"], "ok" if each["ok"] else each["error"], flush=True)
    checked = compared(results["lm_eval"]["features"]) if "lm_eval" in results else {}
    worst = checked.get("log_likelihood_max_difference")
    print(checked)
    write("clients", {"clients": results, "lm_eval_against_transformers": checked})
    (FOLDER / "clients.md").write_text(table(results))
    is_equal = not checked or (worst is not None and worst < 1e-3 and all(checked["generated_as_transformers"]))
    if not is_equal or not all(each["ok"] for client in results.values() for each in client["features"]):
        raise SystemExit("not everything works; see above")


if __name__ == "__main__":
    main()
