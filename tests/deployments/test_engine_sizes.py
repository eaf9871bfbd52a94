"""What an engine's weights, keys and values weigh by configuration, and which of their types go with which device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.capacity.shapes import SHAPES
from deployments.cli.main import main
from deployments.cli.plan import served
from deployments.config import AppConfig, ConfigError
from deployments.engine_config import EngineConfig
from rapid.kernels.cuda.low_bit import pack

LLAMA = SHAPES["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_dtype": "fp8", "device": "cpu"}, "kv_dtype fp8 is for CUDA: on a CPU set kv_dtype to int8 or auto"),
        ({"kv_dtype": "int8", "device": "cuda"}, "kv_dtype int8 is for a CPU: on CUDA set kv_dtype to fp8 or auto"),
        ({"kv_dtype": "int8", "device": "cuda:1"}, "kv_dtype int8 is for a CPU"),
        ({"kv_dtype": "int8", "num_gpus": 1}, "kv_dtype int8 is for a CPU"),
        ({"kv_dtype": "int8", "dtype": "float32"}, "kv_dtype int8 goes with dtype bfloat16, got float32"),
        ({"kv_dtype": "int8", "dtype": "float16"}, "kv_dtype int8 goes with dtype bfloat16, got float16"),
        ({"kv_dtype": "fp8", "dtype": "float32"}, "kv_dtype fp8 goes with dtype bfloat16 or float16, got float32"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
    ],
    ids=str,
)
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_what_no_device_reads_is_refused_before_anything_is_loaded(
    role: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=said.split(":")[0]) as refused:
        AppConfig.model_validate({role: fields})
    assert said in str(refused.value) and role in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_dtype": "fp8"},
        {"kv_dtype": "fp8", "device": "cuda", "dtype": "float16"},
        {"kv_dtype": "int8", "device": "cpu", "dtype": "bfloat16"},
        {"kv_dtype": "auto", "dtype": "float32"},
    ],
    ids=str,
)
def test_what_a_device_reads_is_taken(fields: dict[str, Any]) -> None:
    assert EngineConfig(**fields).kv_dtype == fields["kv_dtype"]


def test_four_bits_weigh_what_the_kernels_read() -> None:
    """The codes, and a scale and an offset for each group; the head has eight bits."""
    on_cuda = served(EngineConfig(model="llama-3.1-8b", quantization="int4"))
    packed = pack(torch.zeros(256, 4096), "int4")
    assert on_cuda.weight_bytes == packed.num_bytes / (256 * 4096) == 0.5625
    assert served(EngineConfig(model="llama-3.1-8b", quantization="int4", device="cpu")).weight_bytes == 0.625
    head = LLAMA.head_parameters
    assert on_cuda.bytes_held == 0.5625 * LLAMA.layer_parameters + head + 2 * head


@pytest.mark.parametrize(
    ("kv_dtype", "token_bytes"), [("auto", 2 * 2 * 8 * 128 * 32), ("fp8", 2 * 8 * 128 * 32), ("int8", 2 * 8 * 132 * 32)]
)
def test_a_plan_has_keys_and_values_of_few_bits(
    kv_dtype: str, token_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    target = {"model": "meta-llama/Llama-3.1-8B-Instruct", "kv_dtype": kv_dtype}
    path.write_text(yaml.safe_dump({"applications": [{"name": "rapid", "args": {"target": target}}]}))
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--gpu", "h200", "--context", "32000", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["models"]["target"]["kv_bytes_per_token_per_gpu"] == token_bytes
