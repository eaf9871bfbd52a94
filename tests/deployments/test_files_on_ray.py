"""Files where the API, the folder, the retriever and the engines are processes of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from served import LETTERS, ON_RAY, served
from test_files import embedded

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on-ray") / "files"


@pytest.fixture(scope="module")
def client(tiny_folder: Path, folder: Path) -> Iterator[OpenAI]:
    model = folder.parent / "model"
    shutil.copytree(tiny_folder, model)
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    engine = {"model": str(model), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    config = {
        "served_model": "letters",
        "target": engine,
        "colocated": True,
        "retriever": {"long_content_tokens": 64, "options": options},
        "files": {"folder": str(folder)},
        "access": {"api_keys": ["ours", "theirs"]},
    }
    with served(config) as url, OpenAI(base_url=f"{url}/v1", api_key="ours", max_retries=0) as client:
        yield client


def test_a_file_goes_through_all_processes(client: OpenAI, folder: Path) -> None:
    uploaded = client.files.create(file=("letters.txt", LETTERS.encode()), purpose="user_data")
    file = embedded(client, uploaded.id)
    assert file.status == "processed" and list(folder.glob("vectors/*.npy"))
    assert client.files.content(file.id).read() == LETTERS.encode()
    assert [f.id for f in client.files.list()] == [file.id]
    part = {"type": "file", "file": {"file_id": file.id}}

    def ask(client: OpenAI) -> int:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "ab"}]}]
        body = {"model": "letters", "messages": messages, "max_tokens": 4}
        return client.post("/chat/completions", body=body, cast_to=dict)["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]

    warmed = client.post(f"/files/{file.id}/warm", cast_to=dict)
    assert ask(client) >= warmed["prompt_tokens"] - 16 > 500
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client.with_options(api_key="theirs"))
    assert caught.value.param == "messages.0.content.0.file.file_id"
    assert client.files.delete(file.id).deleted
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    page = client.files.create(file=("a.html", b"<html><p>abc"), purpose="user_data")  # read in a process of its own
    assert client.files.delete(page.id).deleted
    again = client.files.create(file=("letters.txt", LETTERS.encode()), purpose="user_data")
    warmed = client.post(f"/files/{again.id}/warm", cast_to=dict)
    assert warmed["cached_tokens"] == 0  # the engine had forgotten it
    client.files.delete(again.id)
