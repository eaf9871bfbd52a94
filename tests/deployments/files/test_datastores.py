"""Answers draft from files and answers of their own key alone, and from nothing that was deleted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import local_api

from deployments.config import PUBLIC, ConfigError, parse_config
from deployments.datastores import Datastores
from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import LONGEST_MATCH
from rapid.errors import ModelMismatch
from rapid.text.tokenizer import load_tokenizer

TEXT = "In the winter of that year the harbour froze over, and the ships lay still until spring."


def datastores(bytes_folder: Path, folder: Path, **datastore: Any) -> Datastores:
    config = {"target": {"model": str(bytes_folder)}, "files": {"folder": str(folder)}, "datastore": datastore}
    return Datastores(parse_config(config), load_tokenizer(str(bytes_folder)))


def tokens_of(bytes_folder: Path, text: str) -> list[int]:
    tokens: list[int] = load_tokenizer(str(bytes_folder)).encode(text)
    return tokens


def finds(bytes_folder: Path, stores: Datastores, salt: str) -> bool:
    """Whether a request with ``salt`` would draft how ``TEXT`` goes on."""
    datastore = stores.of(salt)
    found = datastore.find(tokens_of(bytes_folder, TEXT[:30])) if datastore else None
    return found is not None and found.length == LONGEST_MATCH


def test_texts_of_one_key_are_no_drafts_of_another(bytes_folder: Path, tmp_path: Path) -> None:
    stores = datastores(bytes_folder, tmp_path, files=True, answer_tokens=1000)
    stores.add_file("alice", "name", TEXT)
    assert (
        finds(bytes_folder, stores, "alice")
        and not finds(bytes_folder, stores, "bob")
        and not finds(bytes_folder, stores, PUBLIC)
        and not finds(bytes_folder, stores, "")
    )
    stores.add_answer("bob", tokens_of(bytes_folder, TEXT), ["name"])
    assert finds(bytes_folder, stores, "bob")
    stores.remove("bob", "name")
    assert finds(bytes_folder, stores, "alice") and not finds(bytes_folder, stores, "bob")


def test_what_is_not_configured_is_neither_kept_nor_read(bytes_folder: Path, tmp_path: Path) -> None:
    nothing = datastores(bytes_folder, tmp_path)
    nothing.add_file("", "name", TEXT)
    nothing.add_answer("", tokens_of(bytes_folder, TEXT), [])
    assert nothing.of("") is None and not (tmp_path / "datastores").exists()
    answers = datastores(bytes_folder, tmp_path, answer_tokens=1000)
    answers.add_file("", "name", TEXT)
    assert not finds(bytes_folder, answers, "")
    datastores(bytes_folder, tmp_path, files=True).add_file("", "name", TEXT)
    assert not finds(bytes_folder, answers, "")
    nothing.remove("", "name")  # also of a kind that is not configured any more
    assert not finds(bytes_folder, datastores(bytes_folder, tmp_path, files=True), "")


def test_a_datastore_of_all_keys_is_checked_at_the_start(bytes_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datastore\.path: .* holds no datastore"):
        datastores(bytes_folder, tmp_path, path=str(tmp_path / "absent"))
    DatastoreFolder(tmp_path / "other", "another").add("text", [1, 2, 3])
    with pytest.raises(ModelMismatch, match="made for the tokenizer another"):
        datastores(bytes_folder, tmp_path, path=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="strategy rest needs datastore"):
        parse_config({"speculation": {"strategy": "rest"}})


class Client:
    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def ask(self, content: Any, strategy: str = "rest", num_tokens: int = 24) -> dict[str, Any]:
        rapid = {"strategy": strategy, "num_draft_tokens": 4}
        body = {"model": "bytes", "messages": [{"role": "user", "content": content}], "temperature": 0}
        answer = self.http.post("/v1/chat/completions", json=body | {"max_tokens": num_tokens, "rapid": rapid}).json()
        assert "choices" in answer, answer
        return {"text": answer["choices"][0]["message"]["content"]} | answer["rapid"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datastores")


@pytest.fixture(scope="module")
def clients(bytes_folder: Path, folder: Path) -> Iterator[tuple[Client, Client]]:
    engine = {"model": str(bytes_folder), "kv_memory_gib": 0.1, "threads": 1}
    retriever = {"long_content_tokens": 100, "options": {"chunk_tokens": 64, "min_tokens": 64, "threshold": -1}}
    more = {"access": {"api_keys": ["alice", "bob"]}, "files": {"folder": str(folder)}}
    config = {"served_model": "bytes", "target": engine, "colocated": True, "retriever": retriever, **more}
    with local_api(config | {"datastore": {"files": True, "answer_tokens": 10_000}}) as url:
        alice, bob = Client(url, "alice"), Client(url, "bob")
        yield alice, bob
        alice.http.close()
        bob.http.close()


def test_a_second_answer_drafts_from_the_first_of_the_same_key(clients: tuple[Client, Client]) -> None:
    alice, bob = clients
    first = alice.ask("Why did the ships lie still?")
    again, of_bob = alice.ask("Why did the ships lie still?"), bob.ask("Why did the ships lie still?")
    assert first["text"] == again["text"] == of_bob["text"]
    assert first["datastore_drafted"] == 0 == of_bob["datastore_drafted"]
    assert again["datastore_accepted"] == again["accepted"] > 10 and again["rounds"] < first["rounds"]
    assert bob.ask("Why did the ships lie still?", "rapid")["datastore_accepted"] > 10


def test_deleting_a_file_takes_its_text_and_the_answers_about_it_out(
    clients: tuple[Client, Client], folder: Path, bytes_folder: Path
) -> None:
    def kept() -> Counter[str]:
        """How many texts of each kind are kept for all keys."""
        paths = folder.glob("datastores/*/*/*")
        return Counter(path.name for path in paths for _ in DatastoreFolder(path).texts())

    before, ids = kept(), []
    for client in clients:
        file = client.http.post("/v1/files", files={"file": ("a.txt", TEXT)}, data={"purpose": "user_data"}).json()
        client.ask([{"type": "file", "file": {"file_id": file["id"]}}, {"type": "text", "text": "Why?"}])
        ids.append(file["id"])
    eventually(lambda: kept() - before == Counter(files=2, answers=2))  # files are added in the background
    for i, client in enumerate(clients):
        assert client.http.delete(f"/v1/files/{ids[i]}").status_code == 200
        assert kept() - before == Counter(files=1 - i, answers=1 - i)
    data = b"".join(path.read_bytes() for path in folder.glob("datastores/*/*/*/*.npy"))
    assert np.array(tokens_of(bytes_folder, "harbour"), np.uint32).tobytes() not in data


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
