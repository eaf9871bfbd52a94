"""Every promise is held to Qdrant in this process and to a server reached over HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from retrieval import ChunkStore, RetrievalError


class FakeServer(ThreadingHTTPServer):
    """The part of Qdrant's REST interface that the store speaks, in front of an in-process Qdrant."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.qdrant = QdrantClient(":memory:")
        self.lock = threading.Lock()
        self.indexes: list[dict] = []
        self.hide_collections = False  # as seen just before another process creates one
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_call(self, method: str, path: list[str], body: dict) -> tuple[int, object]:
        name, rest = path[1], "/".join(path[2:])
        if rest == "exists":
            return 200, {"exists": not self.hide_collections and self.qdrant.collection_exists(name)}
        if (method, rest) == ("PUT", ""):
            if self.qdrant.collection_exists(name):
                return 409, "already exists"
            self.qdrant.create_collection(name, models.VectorParams(**body["vectors"]))
            return 200, True
        if (method, rest) == ("GET", ""):
            return 200, json.loads(self.qdrant.get_collection(name).model_dump_json())
        done = {"operation_id": 0, "status": "completed"}
        if rest == "index":
            self.indexes.append(body)
        elif rest == "points":
            self.qdrant.upsert(name, [models.PointStruct(**point) for point in body["points"]])
        elif rest == "points/delete":
            self.qdrant.delete(name, models.FilterSelector(**body))
        elif rest == "points/count":
            return 200, {"count": self.qdrant.count(name, models.Filter(**body["filter"])).count}
        elif rest == "points/query":
            found = self.qdrant.query_points(
                name,
                body["query"]["nearest"],
                query_filter=models.Filter(**body["filter"]),
                limit=body["limit"],
                score_threshold=body["score_threshold"],
            )
            return 200, json.loads(found.model_dump_json())
        return 200, done


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        with self.server.lock:
            status, result = self.server.handle_call(self.command, self.path.split("?")[0].strip("/").split("/"), body)
        content = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.shutdown()
    server.server_close()


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
        owner, n = uuid.uuid4().hex, 3 + i
        try:
            for _ in range(5):
                store.add(owner, rows(*[0.1 * i] * n))
                found = store.search(owner, EAST, limit=50, threshold=-1)
                if [position for position, _ in found] != list(range(n)) or store.count(owner) != n:
                    wrong.append(found)
                store.delete(owner)
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
    assert server.indexes[0] == {"field_name": "owner", "field_schema": {"type": "keyword", "is_tenant": True}}


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
    server.shutdown()
    server.server_close()
    for call in (
        lambda: store.add("me", rows(0.1)),
        lambda: store.search("me", EAST, limit=1, threshold=0),
        lambda: store.count("me"),
        lambda: store.delete("me"),
    ):
        with pytest.raises(RetrievalError, match=server.url):
            call()
    store.close()


def test_a_url_that_is_none_is_refused():
    with pytest.raises(RetrievalError, match="ftp://qdrant"):
        ChunkStore("ftp://qdrant", dimension=4)
