"""`rapid doctor` finds what would not run, and says what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rapid.datastore.folder import DatastoreFolder
from rapid.text.tokenizer import fingerprint, load_tokenizer

Run = Callable[..., tuple[int, str, str]]
LITTLE = {"num_cpus": 0.1, "kv_memory_gib": 0.25}


@pytest.fixture
def doctor(run: Run, tmp_path: Path) -> Callable[..., dict[str, dict[str, str]]]:
    """The findings about a configuration by what was looked at; the exit code must agree with them."""

    def call(port: int = 0, **args: Any) -> dict[str, dict[str, str]]:
        args = {"target": LITTLE, "drafter": LITTLE} | args
        application = {"import_path": "deployments.app:build", "args": args}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        code, out, _ = run("doctor", "config.yaml", "--json")
        findings = json.loads(out)
        assert code == any(finding["status"] == "problem" for finding in findings)
        return {f"{finding['check']} {finding['status']}": finding for finding in findings}

    return call


def test_a_machine_that_runs_the_embedded_models_has_no_problem_and_loads_no_weights(
    run: Run, doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rapid.models.loader.AutoModelForCausalLM", None)
    found = doctor()
    assert not [name for name in found if name.endswith("problem")]
    assert {
        "software ok",
        "config ok",
        "model ok",
        "tokenizers ok",
        "target ok",
        "drafter ok",
        "port ok",
    } <= found.keys()
    assert torch.__version__ in found["software ok"]["message"]
    assert run("doctor", "config.yaml")[1].endswith("no problems\n")


def test_what_does_not_fit_is_said_with_what_to_do(doctor: Callable[..., Any]) -> None:
    finding = doctor(target=LITTLE | {"kv_memory_gib": 1e6})["target problem"]
    assert "more than is free" in finding["message"]
    assert "kv_memory_gib" in finding["advice"]


def test_keys_and_values_for_less_than_a_window_are_worth_a_word(doctor: Callable[..., Any]) -> None:
    finding = doctor(drafter=LITTLE | {"kv_memory_gib": 0.01})["drafter warning"]
    assert "less than its window of 8,192" in finding["message"]


def test_a_datastore_that_is_absent_or_of_another_model_is_a_problem(
    doctor: Callable[..., Any], tmp_path: Path, smollm: Path
) -> None:
    absent = doctor(datastore={"path": str(tmp_path / "absent")})["datastore problem"]
    assert "holds no datastore" in absent["message"] and "rapid datastore build" in absent["advice"]
    DatastoreFolder(tmp_path / "other", "another").add("text", [1, 2, 3])
    other = doctor(datastore={"path": str(tmp_path / "other")})["datastore problem"]
    assert "made for the tokenizer another" in other["message"]
    DatastoreFolder(tmp_path / "ours", fingerprint(load_tokenizer(str(smollm)))).add("text", [1, 2, 3])
    assert "holds 3 tokens" in doctor(datastore={"path": str(tmp_path / "ours")})["datastore ok"]["message"]


def test_keys_and_values_are_counted_as_they_are_stored(doctor: Callable[..., Any]) -> None:
    """The same memory has room for more tokens: 64 numbers and a scale are 68 bytes instead of 128."""

    def tokens(kv_dtype: str) -> int:
        target = LITTLE | {"device": "cpu", "dtype": "bfloat16", "kv_dtype": kv_dtype}
        said: str = doctor(target=target)["target ok"]["message"]
        return int(said.partition(" tokens")[0].rpartition(" ")[2].replace(",", ""))

    assert tokens("int8") / tokens("auto") == pytest.approx(128 / 68, rel=1e-3)


def test_models_that_are_not_there_and_tokenizers_that_differ_are_problems(
    doctor: Callable[..., Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor(drafter=LITTLE | {"model": str(tiny_folder)})
    assert "different tokenizers" in found["tokenizers problem"]["message"]
    assert "no folder /absent" in doctor(target=LITTLE | {"model": "/absent"})["model problem"]["message"]
    monkeypatch.setenv("RAPID_CACHE", str(tmp_path / "empty"))
    assert "rapid models pull" in doctor()["model warning"]["advice"]


def test_what_ray_cannot_reserve_here_is_a_problem(doctor: Callable[..., Any]) -> None:
    assert "here are" in doctor(target=LITTLE | {"num_gpus": 99})["Ray problem"]["message"]
    assert "reserves 1000" in doctor(retriever={"num_cpus": 999.6})["Ray problem"]["message"]


def test_a_port_that_is_taken_is_a_problem(doctor: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = doctor(port=taken.getsockname()[1])["port problem"]
    assert "Address already in use" in finding["message"]
    assert "http_options.port" in finding["advice"]


def test_a_qdrant_that_does_not_answer_is_a_problem(doctor: Callable[..., Any]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert url in doctor(retriever={"qdrant_url": url})["Qdrant problem"]["message"]


def test_a_wrong_configuration_is_one_problem_beside_the_machine(run: Run) -> None:
    code, out, _ = run("doctor", "absent.yaml")
    assert (code, "absent.yaml: cannot be read" in out, "1 problem\n" in out) == (1, True, True)
