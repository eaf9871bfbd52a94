"""A model spread over several GPUs: what goes where, and that no operation ever mixes two of them.

There is no GPU here: PyTorch's FakeTensorMode pretends them. Its tensors have a shape and a device and no content, and
an operation over two devices is an error, as it is with real ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretended import pretend_cuda
from running import decode, logits_after, opened, random_tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, PreTrainedModel

from cluster.capacity.shapes import ModelShape
from rapid.engine.engine import Engine
from rapid.errors import ModelFileError
from rapid.kernels.cpu.attention import RunAttention
from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache import memory
from rapid.kv_cache.memory import FREE_MEMORY_SHARE, kv_budget
from rapid.kv_cache.pool import KVLayout
from rapid.models import device_map, model
from rapid.models.device_map import spread
from rapid.models.info import GraphLimits
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.text.tokenizer import load_tokenizer

MakeNetwork = Callable[..., PreTrainedModel]
FIRST, SECOND, THIRD = (torch.device("cuda", i) for i in range(3))
LAYERS = 4


class _Indexing(TorchFunctionMode):
    """Python's brackets as operators: a PyTorch without CUDA cannot switch to a pretended GPU, as brackets do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, parts = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        indices: list[Tensor | None] = []
        dim = 0
        for i, part in enumerate(parts):
            if part is Ellipsis:
                dim = x.dim() - sum(later is not None for later in parts[i + 1 :])
            elif isinstance(part, int):
                x = x.select(dim, part)
            elif part is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(part, slice):
                x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop), dim + 1
            else:
                indices, dim = [*indices, *[None] * (dim - len(indices)), part], dim + 1
        return torch.ops.aten.index.Tensor(x, indices) if indices else x


@pytest.fixture
def pretended_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("forward", "compute"):  # FakeTensorMode and inference mode do not go together
        monkeypatch.setattr(Model, name, inspect.unwrap(getattr(Model, name)))
    with torch.no_grad(), FakeTensorMode(), _Indexing():
        yield


def placed(network: PreTrainedModel, device_map: dict[str, torch.device]) -> PreTrainedModel:
    """``network`` as accelerate dispatches it: every part where its longest beginning in ``device_map`` says."""
    for name, module in list(network.named_modules()):
        device = device_map[max(filter(name.startswith, device_map), key=len)]
        for parts in (module._parameters, module._buffers):
            for own, tensor in parts.items():
                if tensor is not None:
                    moved = tensor.to(device)
                    parts[own] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    return network


def layers(*devices: torch.device) -> dict[str, torch.device]:
    return {f"model.layers.{i}": device for i, device in enumerate(devices)}


MAPS = {
    "halves": {"": SECOND, "model.embed_tokens": FIRST, **layers(FIRST, FIRST, SECOND, SECOND)},
    "a head that is the embedding": {"": FIRST, **layers(FIRST, SECOND, SECOND, SECOND), "model.norm": SECOND},
    "an embedding by itself": {"": THIRD, "model.embed_tokens": FIRST, **layers(SECOND, SECOND, SECOND, THIRD)},
    "angles at the end": {"": SECOND, "model.embed": FIRST, "lm_head": FIRST, **layers(FIRST, FIRST, FIRST, SECOND)},
}


def passes(model: Model) -> list[Tensor]:
    """Two prompts in one pass, a token of each in a second, drafts of different lengths in a third."""
    pool = model.new_pool(2**24)
    caches = [cache for cache in (pool.open([], 100), pool.open([], 100)) if cache is not None]
    logits = []
    for lengths, num_rows in (((20, 7), 1), ((1, 1), 1), ((4, 2), 2)):
        logits += model.forward([BatchEntry(c, [1] * n, num_rows) for c, n in zip(caches, lengths, strict=True)])
    return logits


@pytest.mark.usefixtures("pretended_gpus")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", MAPS)
def test_every_operation_has_all_it_needs_on_one_device(tiny_network: MakeNetwork, name: str, kind: str) -> None:
    network = placed(tiny_network(kind=kind, layers=LAYERS, head_dim=16), MAPS[name])
    model = Model(network, None, "spread", attention=PagedAttention(gathered_sdpa, page_size=16))
    of_layers = tuple(MAPS[name][f"model.layers.{i}"] for i in range(LAYERS))
    pool = model.new_pool(2**20)
    assert tuple(rows.device for rows in pool.keys) == tuple(rows.device for rows in pool.values) == of_layers
    assert model.info.device == ", ".join(map(str, dict.fromkeys(of_layers)))
    logits = passes(model)
    assert [tuple(rows.shape) for rows in logits] == [(1, 32), (1, 32), (1, 32), (1, 32), (2, 32), (2, 32)]
    assert {rows.device for rows in logits} == {of_layers[0]}  # where the next tokens go in


@pytest.mark.usefixtures("pretended_gpus")
def test_a_batch_that_stays_on_one_device_is_noticed(
    tiny_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would prove nothing."""
    network = placed(tiny_network(layers=LAYERS), MAPS["halves"])
    model = Model(network, None, "spread", attention=PagedAttention(gathered_sdpa, page_size=16))
    monkeypatch.setattr(PagedBatch, "on", lambda batch, device: batch)
    with pytest.raises(RuntimeError, match=r"same device.*cuda:1.*cuda:0"):
        passes(model)


@pytest.mark.usefixtures("pretended_gpus")
def test_cuda_graphs_are_for_one_device(tiny_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = pretend_cuda(monkeypatch)
    monkeypatch.setattr(model, "GraphRunner", lambda *args, **how: recorder)
    one, two = (
        Model(placed(tiny_network(layers=LAYERS), device_map), None, "spread", attention=recorder.attention)
        for device_map in ({"": SECOND}, MAPS["halves"])
    )
    assert [made.record(made.new_pool(1), GraphLimits()) for made in (one, two)] == [recorder, None]


LONGROPE = {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0} | LONGROPE],
    ids=["dynamic", "longrope"],
)
@pytest.mark.usefixtures("pretended_gpus")
def test_angles_that_depend_on_the_pass_are_refused_by_name(tiny_network: MakeNetwork, rope: dict[str, Any]) -> None:
    """The host would wait for the device in every pass to find its longest sequence."""
    network = tiny_network(layers=LAYERS, rope_parameters=rope | {"rope_theta": 1e4})
    with pytest.raises(ModelFileError, match=f"spread: rope_type {rope['rope_type']} .* CUDA"):
        Model(placed(network, {"": SECOND}), None, "spread", attention=PagedAttention(gathered_sdpa))


# What goes where


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a model of a few GB, without weights: to say where they go, none are needed."""
    folder = tmp_path_factory.mktemp("large")
    fields = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(**fields, num_hidden_layers=8, vocab_size=32_000).save_pretrained(folder)
    return str(folder)


LARGE_BYTES = 2 * ModelShape(8, 4096, 11_008, 32, 8, 128, 32_000).num_parameters

pretended_room = pytest.mark.filterwarnings("ignore:Current model requires")  # the angles' table, beside no GPU


@pretended_room
def test_two_gpus_get_about_half_each_in_the_order_of_the_layers(large: str) -> None:
    devices = spread(large, torch.bfloat16, {0: 10 * 10**9, 1: 10 * 10**9})
    of_layers = [devices[f"model.layers.{i}"] for i in range(8)]
    assert of_layers == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (devices["model.embed_tokens"], devices["lm_head"]) == (0, 1)


@pretended_room
def test_weights_that_find_no_room_on_the_gpus_are_not_left_elsewhere(large: str) -> None:
    share = int(0.45 * LARGE_BYTES)
    with pytest.raises(ModelFileError) as refused:
        spread(large, torch.bfloat16, {0: share, 1: share})
    missing, total = (float(number) for number in re.findall(r"([\d.]+) GB", refused.value.message)[:2])
    assert total == pytest.approx(LARGE_BYTES / 1e9, abs=0.01)
    assert 0.1 * total - 0.01 <= missing <= 0.3 * total  # a layer is not cut, so some room stays unused
    assert "on 2 GPUs, with " in refused.value.message and "num_gpus" in refused.value.message
    assert set(spread(large, torch.bfloat16, {0: share, 1: share, 2: share}).values()) == {0, 1, 2}


def test_a_host_with_too_little_memory_says_so(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_map, "free_memory", lambda device: LARGE_BYTES)
    with pytest.raises(ModelFileError, match="find no room on the host"):  # a part of it is for keys and values
        spread(large, torch.bfloat16)
    monkeypatch.setattr(device_map, "free_memory", lambda device: 2 * LARGE_BYTES)
    assert spread(large, torch.bfloat16) == {"": "cpu"}


def test_keys_and_values_are_bounded_by_the_gpu_with_least_room_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", {FIRST: 1000, SECOND: 3000, THIRD: 10**9}.__getitem__)
    assert kv_budget([FIRST] * 4) == 1000 * FREE_MEMORY_SHARE
    assert kv_budget([FIRST, SECOND, SECOND, SECOND]) == 4 * 1000 * FREE_MEMORY_SHARE
    assert kv_budget([FIRST, FIRST, SECOND, THIRD]) == 2 * 1000 * FREE_MEMORY_SHARE
    devices = [FIRST, SECOND, SECOND]
    layout = KVLayout(1, 1, torch.float32, tuple(devices))
    for device, free in ((FIRST, 1000), (SECOND, 3000)):
        share = layout.devices.count(device) / layout.num_layers
        assert share * kv_budget(devices) <= free * FREE_MEMORY_SHARE


# On a CPU alone


def test_where_there_is_no_gpu_nothing_changes(tiny_network: MakeNetwork, tmp_path: Path) -> None:
    tiny_network(1000, layers=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    load_tokenizer("smollm2-135m-instruct").save_pretrained(tmp_path)
    tokens = random_tokens(60, seed=1)
    texts, logits = [], []
    for how in ("auto", None):
        model = load_model(str(tmp_path), dtype="float32", device_map=how)
        logits.append(logits_after(model, tokens))
        assert (model.info.device, type(model.attention)) == ("cpu", RunAttention)
        engine = Engine(model, kv_bytes=2**20)
        texts.append(decode(engine, opened(engine, tokens), 40))
        engine.shutdown()
    assert torch.equal(*logits)
    assert texts[0] == texts[1] and len(set(texts[0])) > 5
