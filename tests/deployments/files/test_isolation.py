"""With `isolation: key` no key can find out, use or remove what another key has brought."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import local_api

from retrieval.embedding import Embedder

TEXT = "\n\n".join(f"Article {i}. Item {i * 13 % 97} is to be delivered by day {i * 7}." for i in range(20))


class Tenant:
    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def cached(self, text: str = TEXT, strategy: str = "autoregressive", **retrieval: Any) -> int:
        rapid = {"strategy": strategy, "retrieval": retrieval}
        messages = [{"role": "user", "content": f"{text}\n\nWhat?"}]
        body = {"model": "bytes", "messages": messages, "max_tokens": 1, "rapid": rapid}
        answer = self.http.post("/v1/chat/completions", json=body).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def upload(self) -> str:
        file = self.http.post("/v1/files", files={"file": ("a.txt", TEXT)}, data={"purpose": "user_data"}).json()
        deadline = time.monotonic() + 60
        while self.http.get(f"/v1/files/{file['id']}").json()["status"] == "processing":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return str(file["id"])

    def delete(self, file_id: str) -> None:
        assert self.http.delete(f"/v1/files/{file_id}").status_code == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isolated")


@pytest.fixture(scope="module")
def tenants(bytes_folder: Path, folder: Path) -> Iterator[tuple[Tenant, Tenant]]:
    engine = {"model": str(bytes_folder), "kv_memory_gib": 0.1, "threads": 1}
    retriever = {"long_content_tokens": 100, "options": {"chunk_tokens": 64, "min_tokens": 64, "threshold": -1}}
    more = {"access": {"api_keys": ["alice", "bob"]}, "files": {"folder": str(folder)}}
    config = {"served_model": "bytes", "target": engine, "colocated": True, "retriever": retriever, **more}
    with local_api(config) as url:
        alice, bob = Tenant(url, "alice"), Tenant(url, "bob")
        yield alice, bob
        alice.http.close()
        bob.http.close()


def test_cached_tokens_do_not_tell_who_has_read_a_text(tenants: tuple[Tenant, Tenant]) -> None:
    alice, bob = tenants
    alice.cached()
    assert alice.cached() > 1000
    assert bob.cached() == 0
    assert bob.cached() > 1000


def test_how_soon_passages_come_does_not_tell_who_has_asked_about_a_text(
    tenants: tuple[Tenant, Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of which the embedder knows the vectors is answered within a moment."""
    alice, bob = tenants
    text = "\n\n".join(f"Section {i} says that part {i * 17 % 101} is to be kept for {i} years." for i in range(20))
    embedded: list[str] = []
    embed = Embedder._embed

    def watched(self: Embedder, texts: list[str], *how: Any, **more: Any) -> Any:
        embedded.extend(texts)
        return embed(self, texts, *how, **more)

    def num_embedded(ask: Callable[[], object]) -> int:
        embedded.clear()
        ask()
        return len(embedded)

    monkeypatch.setattr(Embedder, "_embed", watched)
    ours, again, theirs = (
        num_embedded(partial(each.cached, text, "rag", chunk_tokens=64)) for each in (alice, alice, bob)
    )
    assert again == 1 and theirs == ours > 10  # 1: the question
    body = {"model": "bytes", "input": ["A clause.", "Another one."]}
    asked = [num_embedded(partial(each.http.post, "/v1/embeddings", json=body)) for each in (alice, alice, bob)]
    assert asked == [2, 0, 2]


def test_a_deletion_reaches_only_the_key_that_deletes(tenants: tuple[Tenant, Tenant], folder: Path) -> None:
    alice, bob = tenants
    ours, theirs = alice.upload(), bob.upload()
    assert len(list(folder.glob("contents/*/original"))) == 2 == len(list(folder.glob("vectors/*.npz")))
    for tenant in tenants:
        tenant.cached()
    bob.delete(theirs)
    assert bob.cached() < 48 and alice.cached() > 1000
    assert len(list(folder.glob("contents/*/original"))) == 1 == len(list(folder.glob("vectors/*.npz")))
    assert alice.http.get(f"/v1/files/{ours}").json()["status"] == "processed"
    alice.delete(ours)
    assert alice.cached() < 48 and not list(folder.glob("vectors/*.npz"))
