"""The part of Qdrant's REST interface that the store speaks, in front of an in-process Qdrant.

As a program it serves the port that it is given, and wants the key in QDRANT_API_KEY.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qdrant_client import QdrantClient, models


class FakeServer(ThreadingHTTPServer):
    """Forgets everything when it ends. With an ``api_key`` it answers 401 to whoever does not send it."""

    daemon_threads = True

    def __init__(self, port: int = 0, api_key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.api_key = api_key
        self.qdrant = QdrantClient(":memory:")
        self.lock = threading.Lock()
        self.indexes: list[dict] = []
        self.hide_collections = False  # as seen just before another process creates one

    def handle_call(self, method: str, path: list[str], body: dict) -> tuple[int, object]:
        name, rest = path[1], "/".join(path[2:])
        if rest == "exists":
            return 200, {"exists": not self.hide_collections and self.qdrant.collection_exists(name)}
        if (method, rest) == ("PUT", ""):
            if self.qdrant.collection_exists(name):
                return 409, "already exists"
            dense = {name: models.VectorParams(**params) for name, params in body["vectors"].items()}
            sparse = {name: models.SparseVectorParams(**params) for name, params in body["sparse_vectors"].items()}
            self.qdrant.create_collection(name, dense, sparse)
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
        elif rest == "points/query/batch":
            searches = [models.QueryRequest.model_validate(search) for search in body["searches"]]
            found = self.qdrant.query_batch_points(name, searches)
            return 200, [json.loads(answer.model_dump_json()) for answer in found]
        return 200, done


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        path = self.path.split("?")[0].strip("/").split("/")
        with self.server.lock:
            if self.server.api_key in (None, self.headers.get("api-key")):
                status, result = self.server.handle_call(self.command, path, body)
            else:
                status, result = 401, "an API key is required"
        content = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    FakeServer(int(sys.argv[1]), os.environ["QDRANT_API_KEY"]).serve_forever()
