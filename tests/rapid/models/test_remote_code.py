"""A model's folder may name code of its own: it is never run, whatever a person at the terminal would answer."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rapid.errors import RapidError
from rapid.models.loader import load_model
from rapid.text.tokenizer import load_tokenizer

CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(PretrainedConfig):
    model_type = "strange"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code in it, and a terminal that says yes to everything."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": "code.Tokenizer"}
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder


@pytest.mark.parametrize("load", [load_model, load_tokenizer], ids=["model", "tokenizer"])
def test_code_in_a_models_folder_is_not_run(
    load: Callable[[str], object], strange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rapid.models.loader.load_tokenizer", lambda _: None)  # which would refuse the folder first
    with pytest.raises(RapidError):
        load(str(strange))
    assert not (strange.parent / "ran").exists()


def test_every_call_that_loads_says_so() -> None:
    """Some load only where a GPU is, or a model comes from the hub."""
    root, num_calls = Path(__file__).parents[3], 0
    for file in (path for package in ("rapid", "retrieval", "deployments") for path in (root / package).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained":
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert said.get("trust_remote_code") == "False", f"{file}:{call.lineno}"
                num_calls += 1
    assert num_calls >= 7
