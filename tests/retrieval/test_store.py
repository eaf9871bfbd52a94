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
from qdrant_client import models
from qdrant_double import FakeServer

from retrieval import RetrievalError
from retrieval.deadline import TimeLeft
from retrieval.errors import StoreTimeout
from retrieval.sparse import bm25_passages, bm25_query
from retrieval.store import ChunkStore
from retrieval.vectors import ChunkVectors, Query


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


def rows(*angles: float, texts: list[str] | None = None) -> ChunkVectors:
    dense = np.array([[np.cos(a), np.sin(a), 0, 0] for a in angles], dtype=np.float32)
    return ChunkVectors(dense, dense, bm25_passages(texts or ["word"] * len(angles)))


EAST = np.array([1, 0, 0, 0], dtype=np.float32)


def search(store: ChunkStore, *namespaces: str, vector: np.ndarray = EAST) -> list[tuple[int, float]]:
    """(position, cosine), best first."""
    hits = store.search(namespaces, Query(vector, None), limit=1000)
    return [(place[1], hits.scores[place]) for place in hits.ranking]


def test_a_search_returns_positions_and_cosines_best_first(store):
    store.add("me", rows(1.0, 0.1, 0.5))
    found = search(store, "me", vector=3 * EAST)
    assert [position for position, _ in found] == [1, 2, 0]
    np.testing.assert_allclose([score for _, score in found], np.cos([0.1, 0.5, 1.0]), atol=1e-5)


def test_equal_scores_come_in_document_order(store):
    store.add("me", rows(*[0.3] * 20))
    assert [position for position, _ in search(store, "me")] == list(range(20))


def test_no_owner_sees_or_deletes_what_is_anothers(store):
    store.add("me", rows(0.1, 0.2))
    store.add("you", rows(0.0, 0.3, 0.4))
    assert [position for position, _ in search(store, "me")] == [0, 1]
    assert (store.count("me"), store.count("you"), store.count("nobody")) == (2, 3, 0)
    store.delete("me")
    assert (store.count("me"), store.count("you")) == (0, 3)
    assert search(store, "me") == []
    assert search(store, "nobody") == []
    store.delete("nobody")


def test_adding_again_replaces(store):
    store.add("me", rows(0.1, 0.2))
    store.add("me", rows(0.1, 0.2, 0.3))
    assert store.count("me") == 3


def test_many_vectors_go_in_several_messages(store):
    store.add("me", rows(*np.linspace(0.1, 1, 600)))
    assert store.count("me") == 600
    assert search(store, "me")[0][0] == 0


def test_threads_do_not_disturb_each_other(store):
    wrong: list[object] = []

    def work(i: int) -> None:
        namespace, n = uuid.uuid4().hex, 3 + i
        try:
            for _ in range(5):
                store.add(namespace, rows(*[0.1 * i] * n))
                found = search(store, namespace)
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
                found = search(store, "me")
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
    with pytest.raises(RetrievalError, match=r"'chunks'.*'dense': 4.*have length 8"):
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
        lambda: search(store, "me"),
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
    assert [position for position, _ in search(store, "kept")] == [0, 1]
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


def test_a_long_add_lets_others_in_between():
    """In this process: another namespace is searched while a thousand vectors are stored."""
    store = ChunkStore(dimension=4)
    store.add("mine", rows(0.1))
    found = []

    class Watched(ChunkVectors):
        def rows(self, begin, end):
            if begin:
                found.append(in_another_thread(lambda: search(store, "mine")))
            return super().rows(begin, end)

    store.add("yours", Watched(*rows(*[0.2] * 1000)))
    assert store.count("yours") == 1000 and len(found) == 3


def in_another_thread(call):
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(10)
    assert answers
    return answers[0]


def test_a_search_of_long_namespaces_lets_others_in_between(monkeypatch):
    """In this process what is searched together is copied together first, batch by batch."""
    store = ChunkStore(dimension=4)
    store.add("mine", rows(0.1))
    angles = np.linspace(0.2, 1.2, 600)
    store.add("first", rows(*angles[::2]))
    store.add("second", rows(*angles[1::2]))
    copy, upsert, found, batches = store._copy, store._client.upsert, [], []

    def counted(collection, points):
        batches.append(len(points))
        upsert(collection, points)

    def watched(collection, to):
        copy(collection, to)
        found.append(in_another_thread(lambda: store.search(["mine"], Query(EAST, None), limit=1)))

    monkeypatch.setattr(store, "_copy", watched)
    monkeypatch.setattr(store._client, "upsert", counted)
    hits = store.search(["first", "second"], Query(EAST, None), limit=600)
    assert batches == 2 * [256, 44]  # between two of them, too
    assert len(found) == 2 and len(hits.ranking) == 600
    assert list(hits.ranking) == [(("first", "second")[i % 2], i // 2) for i in range(600)]


def test_in_process_no_call_waits_for_a_search_of_another_namespace(monkeypatch):
    store = ChunkStore(dimension=4)
    store.add("mine", rows(0.1))
    mine = store._lock_of(store._collection_of("mine"))
    yours = next(name for name in map(str, range(999)) if store._lock_of(store._collection_of(name)) is not mine)
    query, found = store._client.query_batch_points, []

    def watched(collection, requests):
        if collection == store._collection_of("mine"):
            in_another_thread(lambda: store.add(yours, rows(0.2)) or store)
            found.append(in_another_thread(lambda: search(store, yours)))
        return query(collection, requests)

    monkeypatch.setattr(store._client, "query_batch_points", watched)
    assert search(store, "mine") and len(found) == 1


def test_in_process_no_namespace_has_a_lock_that_every_search_takes(monkeypatch):
    """Whatever the hashes of this run are: one namespace whose lock is that of the collection's name alone."""
    store = ChunkStore(dimension=4)
    shared = store._lock_of(store._collection)
    mine = next(name for name in map(str, range(9999)) if store._lock_of(store._collection_of(name)) is shared)
    yours = next(name for name in map(str, range(9999)) if store._lock_of(store._collection_of(name)) is not shared)
    store.add(mine, rows(0.1))
    store.add(yours, rows(0.2))
    query, found = store._client.query_batch_points, []

    def watched(collection, requests):
        if collection == store._collection_of(mine):
            found.append(in_another_thread(lambda: search(store, yours)))
        return query(collection, requests)

    monkeypatch.setattr(store._client, "query_batch_points", watched)
    assert search(store, mine) and len(found) == 1


def test_a_deletion_ends_a_long_add(monkeypatch):
    store = ChunkStore(dimension=4)
    upsert = store._client.upsert

    def deleted_meanwhile(collection: str, points: Any, **how: Any) -> None:
        upsert(collection, points, **how)
        if points[0].payload["position"] == 256:
            store._client.delete_collection(collection)

    monkeypatch.setattr(store._client, "upsert", deleted_meanwhile)
    store.add("me", rows(*[0.2] * 1000))
    assert store.count("me") == 0


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("retrieval.store._TIMEOUT_S", 0.2)  # of a client that is made from here on


def test_a_server_that_accepts_and_does_not_answer_costs_one_timeout(server, impatient):
    store = ChunkStore(server.url, dimension=4)
    store.add("mine", rows(0, 1))
    with server.lock:  # no handler goes on meanwhile
        with pytest.raises(StoreTimeout, match="has not answered"):
            search(store, "mine")
        for _ in range(3):
            with pytest.raises(StoreTimeout, match="did not answer a moment ago"):  # and costs no time
                store.delete("mine")
    store._silent_until = 0.0
    assert len(search(store, "mine")) == 2


def test_a_slow_server_has_one_budget_for_all_calls_of_a_block(server):
    store = ChunkStore(server.url, dimension=4)
    store.add("mine", rows(0, 1))
    with store.within(TimeLeft(1e-6)):
        store.count("mine")  # which takes more than that
        with pytest.raises(StoreTimeout, match="too slow"):
            store.count("mine")
    assert store.count("mine") == 2
    with store.within(TimeLeft(60)):
        assert store.count("mine") == 2


def test_a_hybrid_search_fuses_the_ranks_in_context_and_of_words(store):
    """Held to 1 / (k + rank), ranks from 0 and k = 10; the scores are the plain cosines."""
    texts = ["a ship", "a whale", "whale whale ship", "nothing"]
    dense, context = rows(0.1, 0.2, 0.3, 0.4).dense, rows(0.9, 0.1, 0.5, 0.3).dense
    store.add("me", ChunkVectors(dense, context, bm25_passages(texts)))
    hits = store.search(["me"], Query(EAST, bm25_query("whale")), limit=10)
    in_context, words = [1, 3, 2, 0], [2, 1]
    expected = {
        ("me", i): 1 / (10 + in_context.index(i)) + (1 / (10 + words.index(i)) if i in words else 0) for i in range(4)
    }
    assert hits.ranking == pytest.approx(expected) and list(hits.ranking) == [("me", i) for i in (1, 2, 3, 0)]
    assert hits.scores == pytest.approx({("me", i): np.cos(0.1 * (i + 1)) for i in range(4)}, abs=1e-5)
    without_words = store.search(["me"], Query(EAST, bm25_query("?!")), limit=10)
    assert [place[1] for place in without_words.ranking] == in_context


def test_rarity_is_counted_in_what_is_searched_alone(store):
    mine = rows(0.1, 0.2, texts=["a rare thing", "a thing"])
    store.add("me", mine)
    before = store.search(["me"], Query(None, bm25_query("rare thing")), limit=10)
    store.add("you", rows(*[0.1] * 30, texts=["rare rare rare"] * 30))
    assert store.search(["me"], Query(None, bm25_query("rare thing")), limit=10) == before
    both = store.search(["me", "you"], Query(None, bm25_query("rare thing")), limit=50)
    assert len(both.ranking) == 32 and both.scores["me", 0] != before.scores["me", 0]


def test_a_collection_of_an_earlier_version_is_refused(server):
    """It had one dense vector and no words."""
    server.qdrant.create_collection("chunks", models.VectorParams(size=4, distance=models.Distance.COSINE))
    with pytest.raises(RetrievalError, match=r"'chunks'.*lengths unnamed.*Delete that collection"):
        ChunkStore(server.url, collection="chunks", dimension=4)
    ChunkStore(server.url, collection="others", dimension=4, idf=False).close()
    with pytest.raises(RetrievalError, match="modifier none"):
        ChunkStore(server.url, collection="others", dimension=4)
