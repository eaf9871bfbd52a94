"""`rapid plan`: what it prints, and that it needs neither Ray nor a model nor the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.capacity.devices import GPUS
from deployments.cli.main import main
from deployments.cli.plan import shape_of
from rapid.weights import embedded_models

ROOT = Path(__file__).parents[3]
LLAMA = {"model": "meta-llama/Llama-3.1-8B-Instruct"}
PAIR = {"target": LLAMA, "drafter": LLAMA | {"quantization": "int4"}}

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Plan:
    """Runs `rapid plan` on these args of a config: (exit code, stdout, stderr)."""

    def call(args: dict[str, Any], *options: Any) -> tuple[int, str, str]:
        path = tmp_path / "serve_config.yaml"
        path.write_text(yaml.safe_dump({"applications": [{"name": "rapid", "args": args}]}))
        with pytest.raises(SystemExit) as end:
            main(["plan", str(path), *map(str, options)])
        return (end.value.code or 0, *capsys.readouterr())

    return call


def test_json_has_memory_times_fleet_and_ratios(plan: Plan) -> None:
    code, out, _ = plan(PAIR, "--gpu", "h200", "--context", 100_000, "--users", 8, "--price", 3, "--json")
    made = json.loads(out)
    assert code == 0
    assert made["models"]["target"]["weight_bytes_per_gpu"] == pytest.approx(16.06e9, rel=1e-3)
    assert made["models"]["target"]["kv_bytes_per_token_per_gpu"] == 131_072
    assert made["models"]["drafter"]["weight_bytes_per_gpu"] < 6e9
    assert set(made["ways"]) == {"plain", "in turn", "overlapped"}
    for way in made["ways"].values():
        assert way["fleet"]["tokens_per_second"] == pytest.approx(8 * way["tokens_per_second"])
    assert made["ways"]["plain"]["fleet"]["drafters"] == 0
    gpus = made["ways"]["overlapped"]["fleet"]["gpus"]
    assert {row["num_targets"] + row["num_drafters"] for row in made["ratios"]} == {gpus}


def test_what_the_configuration_does_not_allow_is_said_and_its_ratios_are_simulated(plan: Plan) -> None:
    """Eight targets of one GPU and four drafters of four, beside the embedder's GPU, for a load that takes more."""
    args = yaml.safe_load((ROOT / "configs" / "llama-8b-70b.yaml").read_text())["applications"][0]["args"]
    options = ("--gpu", "h200", "--context", 122_000, "--users", 32)
    made = json.loads(plan(args, *options, "--json")[1])
    ways = {name: way["fleet"] for name, way in made["ways"].items()}
    assert ways["plain"]["targets"] == 11 and ways["plain"]["gpus"] == 11 + 1
    assert {(row["num_targets"], row["num_drafters"]) for row in made["ratios"]} >= {(8, 4), (4, 5), (24, 0)}
    notes = made["notes"]
    assert notes[0] == "plain: this takes 11 + 0 replicas; replicas.max allows 8 + 0, which carry 24 users at a time"
    drafted = ways["overlapped"]["targets"] + 4 * ways["overlapped"]["drafters"]
    assert notes[-1] == f"ratios are of the 24 GPUs that replicas.max allows, and not of {drafted}"
    said = plan(args, *options)[1]
    assert all(note in said for note in notes)
    assert "* 4 : 5" in said and "* 8 : 4" not in said and "1 of the GPUs is the embedder's" in said
    assert "never less than 150 µs" in said and "A round's messages take 2.7 ms" in said


def test_a_load_that_the_configuration_carries_needs_no_word(plan: Plan) -> None:
    many = {"replicas": {"max": 8}}
    made = json.loads(plan({"target": LLAMA | many, "drafter": PAIR["drafter"] | many}, "--users", 8, "--json")[1])
    assert made["notes"] == [] and made["ratios"]


def test_tables_are_for_people(plan: Plan) -> None:
    code, out, _ = plan(PAIR, "--gpu", "h100", "--context", 16_000)
    assert code == 0
    assert "sequences that fit" in out and "R : S" in out and "a million tokens" not in out


def test_a_load_takes_more_gpus_than_half_of_it(plan: Plan) -> None:
    gpus = [
        json.loads(plan(PAIR, "--gpu", "h200", "--load", load, "--json")[1])["ways"]["plain"]["fleet"]["gpus"]
        for load in (4, 8)
    ]
    assert gpus[1] > gpus[0]


def test_a_target_that_drafts_itself_needs_one_engine(plan: Plan) -> None:
    made = json.loads(plan({"target": LLAMA, "colocated": True}, "--json")[1])
    assert set(made["models"]) == {"target"} and set(made["ways"]) == {"plain", "in turn"} and made["ratios"] == []
    assert made["notes"] == ["no ratio of targets to drafters: the target drafts for itself"]


def test_the_memory_that_the_config_gives_is_what_counts(plan: Plan) -> None:
    given = PAIR | {"target": LLAMA | {"kv_memory_gib": 8}}
    made = json.loads(plan(given, "--context", 16_000, "--new-tokens", 384, "--json")[1])
    assert made["models"]["target"]["sequences_that_fit"] == 8 * 2**30 // (131_072 * 16_384)
    assert made["workload"]["batch"] == 4


def test_a_fixed_number_of_draft_tokens_is_kept(plan: Plan) -> None:
    made = json.loads(plan(PAIR | {"speculation": {"num_draft_tokens": 3}}, "--json")[1])
    assert made["ways"]["in turn"]["gamma"] == 3
    assert {row["gamma"] for row in made["ratios"] if row["num_drafters"]} == {3}


def test_weights_without_room_say_how_many_ranks_would_do(plan: Plan) -> None:
    big = {"target": {"model": "meta-llama/Llama-3.1-70B"}, "drafter": LLAMA}
    code, _, err = plan(big, "--gpu", "h100")
    assert code == 2 and "tensor_parallel must be at least 2" in err
    ranks = {"target": big["target"] | {"tensor_parallel": 4}, "drafter": LLAMA}
    made = json.loads(plan(ranks, "--gpu", "h100", "--json")[1])
    assert made["ways"]["in turn"]["fleet"]["gpus"] == 4 + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "abacus"], "h100"),
        (["--batch", "9999"], "have no room"),
        (["--users", "2", "--load", "1"], "give one"),
        (["--gpu", "missing.json"], "missing.json"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(plan: Plan, options: list[str], said: str) -> None:
    code, _, err = plan(PAIR, *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_a_measured_machine_is_a_device_too(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"device": asdict(GPUS["l40s"])}))
    options = ("--context", 8000, "--json")
    measured, named = (json.loads(plan(PAIR, "--gpu", gpu, *options)[1]) for gpu in (path, "l40s"))
    assert measured["ways"] == named["ways"]


def test_a_folder_gives_the_shape_that_the_table_has() -> None:
    folder = embedded_models.local_path("smollm2-135m-instruct")
    assert shape_of(str(folder)) == shape_of("smollm2-135m-instruct")


def test_a_model_that_is_nowhere_is_one_line(plan: Plan, tmp_path: Path) -> None:
    code, _, err = plan({"target": {"model": str(tmp_path)}, "drafter": LLAMA})
    assert code == 2 and str(tmp_path) in err and len(err.splitlines()) == 1


def test_planning_loads_no_ray() -> None:
    code = "import sys, deployments.cli.plan; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
