"""What the tests of the application share: the embedded models, and one that is next to nothing."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import MODEL, chat, local_api
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from deployments.cli.main import main
from rapid.weights.embedded_models import entries, local_path


@pytest.fixture(scope="session", autouse=True)
def files_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where what a test uploads goes, unless its configuration says otherwise."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAPID_FILES", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def garbage() -> Iterator[None]:
    """Models that a module has loaded go with it: they are in reference cycles that the collector hardly looks at."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def embedded_models() -> None:
    """Pulled before anything is said about what a command prints."""
    for entry in entries():
        local_path(entry.name)


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_network: Callable[..., PreTrainedModel],
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
) -> Path:
    """A model of a few thousand weights that reads and writes letters, as files."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_network(12, layers=1, window=8192).save_pretrained(folder)
    letter_tokenizer(12).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def letters_url(tiny_folder: Path) -> Iterator[str]:
    """The API over a model of letters in this process; it answers in milliseconds, and means nothing by it."""
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "letters", "target": engine, "drafter": engine}) as url:
        yield url


QWEN_LIKE = """{% if mood %}({{ mood }}){% endif -%}
{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for message in messages %}[{{ message.role }}]{{ message.content -}}
{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory, tiny_network: Callable[..., PreTrainedModel]) -> Path:
    """A random model that reads and writes any text, a byte a token, with a chat template that takes tools."""
    folder = tmp_path_factory.mktemp("bytes")
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=QWEN_LIKE)
    tiny_network(257, layers=1, window=8192, eos=256).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bytes_url(bytes_folder: Path) -> Iterator[str]:
    """The API over that model."""
    engine = {"model": str(bytes_folder), "kv_memory_gib": 0.1, "threads": 1}
    retriever = {"long_content_tokens": 100, "options": {"chunk_tokens": 64, "min_tokens": 64, "threshold": -1}}
    with local_api({"served_model": "bytes", "target": engine, "drafter": engine, "retriever": retriever}) as url:
        yield url


@pytest.fixture(scope="session")
def smollm_url() -> Iterator[str]:
    """The API over the embedded models in this process, in float32; a drafter that shares the target's engine."""
    engine = {"model": MODEL, "dtype": "float32", "kv_memory_gib": 1}
    options = {"chunk_tokens": 64, "min_tokens": 192, "threshold": 0.1}
    retriever = {"long_content_tokens": 256, "options": options}
    with local_api({"target": engine, "colocated": True, "retriever": retriever}) as url:
        yield url


@pytest.fixture(scope="session")
def expected() -> str:
    """transformers' own greedy answer to `chat()`, with its stock attention."""
    folder = local_path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.apply_chat_template(chat(), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = network.generate(**ids, max_new_tokens=24, do_sample=False)
    answer: str = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # `rapid serve` sets it, and nothing else would take it back

    def call(*args: Any, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        return (end.value.code or 0, *capsys.readouterr())

    return call
