"""Every promise is held to Qdrant in this process and to a server reached over HTTP."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from typing import Any

import numpy as np
import pytest
from qdrant_double import FakeServer

from retrieval import RetrievalError
from retrieval.errors import StoreTimeout
from retrieval.store import ChunkStore


@pytest.fixture
def serving():
    """Starts servers in threads; stopping one of them early is allowed."""
    servers: list[FakeServer] = []

    def start(*args: Any) -> FakeServer:
        servers.append(FakeServer(*args))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        stop(server)


def stop(server: FakeServer) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(serving):
    return serving()


@pytest.fixture(params=["in process", "server"])
def store(request):
    url = request.getfixturevalue("server").url if request.param == "server" else None
    store = ChunkStore(url, dimension=4)
    yield store
    store.close()


def rows(*angles: float) -> np.ndarray:
    return np.array([[np.cos(a), np.sin(a), 0, 0] for a in angles], dtype=np.float32)


EAST = rows(0)[0]


def test_a_search_returns_positions_and_cosines_best_first(store):
    store.add("me", rows(1.0, 0.1, 0.5))
    found = store.search("me", 3 * EAST, limit=10, threshold=-1)
    assert [position for position, _ in found] == [1, 2, 0]
    np.testing.assert_allclose([score for _, score in found], np.cos([0.1, 0.5, 1.0]), atol=1e-5)
    assert [position for position, _ in store.search("me", EAST, limit=2, threshold=-1)] == [1, 2]
    assert [position for position, _ in store.search("me", EAST, limit=10, threshold=0.8)] == [1, 2]
    assert store.search("me", EAST, limit=10, threshold=0.999) == []


def test_equal_scores_come_in_document_order(store):
    store.add("me", rows(*[0.3] * 20))
    assert [position for position, _ in store.search("me", EAST, limit=20, threshold=0)] == list(range(20))


def test_no_owner_sees_or_deletes_what_is_anothers(store):
    store.add("me", rows(0.1, 0.2))
    store.add("you", rows(0.0, 0.3, 0.4))
    assert [position for position, _ in store.search("me", EAST, limit=10, threshold=-1)] == [0, 1]
    assert (store.count("me"), store.count("you"), store.count("nobody")) == (2, 3, 0)
    store.delete("me")
    assert (store.count("me"), store.count("you")) == (0, 3)
    assert store.search("me", EAST, limit=10, threshold=-1) == []
    assert store.search("nobody", EAST, limit=10, threshold=-1) == []
    store.delete("nobody")


def test_adding_again_replaces(store):
    store.add("me", rows(0.1, 0.2))
    store.add("me", rows(0.1, 0.2, 0.3))
    assert store.count("me") == 3


def test_many_vectors_go_in_several_messages(store):
    store.add("me", rows(*np.linspace(0.1, 1, 600)))
    assert store.count("me") == 600
    assert store.search("me", EAST, limit=1, threshold=0)[0][0] == 0


def test_threads_do_not_disturb_each_other(store):
    wrong: list[object] = []

    def work(i: int) -> None:
        namespace, n = uuid.uuid4().hex, 3 + i
        try:
            for _ in range(5):
                store.add(namespace, rows(*[0.1 * i] * n))
                found = store.search(namespace, EAST, limit=50, threshold=-1)
                if [position for position, _ in found] != list(range(n)) or store.count(namespace) != n:
                    wrong.append(found)
                store.delete(namespace)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_threads_may_write_and_search_the_same_owner(store):
    """As two requests do that keep the same contents."""
    vectors, wrong = rows(*np.linspace(0.1, 1, 150)), []

    def work() -> None:
        try:
            for _ in range(3):
                store.add("me", vectors)
                found = store.search("me", EAST, limit=200, threshold=-1)
                if [position for position, _ in found] != list(range(150)):
                    wrong.append(found)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and store.count("me") == 150


def test_nothing_is_left_in_process_after_a_delete():
    """In-process Qdrant only marks points as deleted: they would add up, and slow every search."""
    store = ChunkStore(dimension=4)
    for i in range(20):
        store.add(str(i), rows(0.1, 0.2))
        store.delete(str(i))
    assert store._client.get_collections().collections == []


def test_a_server_gets_one_collection_indexed_by_owner(server):
    for _ in range(2):  # the second finds the collection there
        store = ChunkStore(server.url, collection="chunks", dimension=4)
        store.add("me", rows(0.1))
        store.add("you", rows(0.1))
        store.close()
    assert [each.name for each in server.qdrant.get_collections().collections] == ["chunks"]
    assert server.indexes[0] == {"field_name": "namespace", "field_schema": {"type": "keyword", "is_tenant": True}}


def test_losing_the_race_to_create_the_collection_is_no_error(server):
    ChunkStore(server.url, dimension=4).close()
    server.hide_collections = True
    ChunkStore(server.url, dimension=4).close()


def test_a_collection_of_another_dimension_is_refused(server):
    ChunkStore(server.url, collection="chunks", dimension=4).close()
    with pytest.raises(RetrievalError, match=r"'chunks'.*length 4.*have 8"):
        ChunkStore(server.url, collection="chunks", dimension=8)


def test_a_server_that_cannot_be_reached_is_named_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    began = time.perf_counter()
    with pytest.raises(RetrievalError, match=f"{url} cannot be used.*Check the URL"):
        ChunkStore(url, dimension=4)
    assert time.perf_counter() - began < 5


def test_a_server_that_goes_away_is_named(server):
    store = ChunkStore(server.url, dimension=4)
    stop(server)
    for call in (
        lambda: store.add("me", rows(0.1)),
        lambda: store.search("me", EAST, limit=1, threshold=0),
        lambda: store.count("me"),
        lambda: store.delete("me"),
    ):
        with pytest.raises(RetrievalError, match=server.url):
            call()
    store.close()


def test_a_server_that_comes_back_empty_is_filled_again(serving):
    server = serving()
    store = ChunkStore(server.url, dimension=4)
    store.add("kept", rows(0.1, 0.2))
    server.qdrant.delete_collection("rapid_chunks")  # as a server without a volume does when it starts again
    assert store.count("kept") == 0
    store.add("kept", rows(0.1, 0.2))
    assert [position for position, _ in store.search("kept", EAST, limit=2, threshold=0)] == [0, 1]
    assert len(server.indexes) == 2
    store.close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_key_is_sent_and_never_told(serving, caplog):
    caplog.set_level(logging.DEBUG)
    server = serving(0, "open sesame")
    store = ChunkStore(server.url, api_key="open sesame", dimension=4)
    store.add("me", rows(0.1))
    assert store.count("me") == 1
    store.close()
    with pytest.raises(RetrievalError, match="401") as caught:
        ChunkStore(server.url, api_key="open barley", dimension=4)
    assert "barley" not in str(caught.value)
    assert "sesame" not in caplog.text and "barley" not in caplog.text


def test_a_url_that_is_none_is_refused():
    with pytest.raises(RetrievalError, match="ftp://qdrant"):
        ChunkStore("ftp://qdrant", dimension=4)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("retrieval.store._TIMEOUT_S", 0.2)  # of a client that is made from here on


def test_a_server_that_accepts_and_does_not_answer_costs_one_timeout(server, impatient):
    store = ChunkStore(server.url, dimension=4)
    store.add("mine", rows(0, 1))
    with server.lock:  # no handler goes on meanwhile
        with pytest.raises(StoreTimeout, match="has not answered"):
            store.search("mine", EAST, limit=9, threshold=-1)
        for _ in range(3):
            with pytest.raises(StoreTimeout, match="did not answer a moment ago"):  # and costs no time
                store.delete("mine")
    store._silent_until = 0.0
    assert len(store.search("mine", EAST, limit=9, threshold=-1)) == 2


def test_a_slow_server_has_one_budget_for_all_calls_of_a_block(server):
    store = ChunkStore(server.url, dimension=4)
    store.add("mine", rows(0, 1))
    with store.within(1e-6):
        store.count("mine")  # which takes more than that
        with pytest.raises(StoreTimeout, match="too slow"):
            store.count("mine")
    assert store.count("mine") == 2
    with store.within(60):
        assert store.count("mine") == 2
