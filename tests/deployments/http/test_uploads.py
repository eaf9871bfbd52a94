"""`/v1/uploads` as OpenAI's client sees it: files in parts, each key's own, and every refusal by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from served import local_api

TEXT = b"abcab bcacb aabca\n" * 20
WHOLE = {"filename": "a.txt", "mime_type": "text/plain", "purpose": "user_data"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads") / "files"


@pytest.fixture(scope="module")
def serve(bytes_folder: Path) -> Callable[..., Any]:
    def start(folder: Path, files: dict[str, Any] | None = None, **access: Any) -> Any:
        engine = {"model": str(bytes_folder), "kv_memory_gib": 0.1, "threads": 1}
        config = {"served_model": "bytes", "target": engine, "colocated": True}
        keys = {"api_keys": ["ours", "theirs"]}
        return local_api(config | {"files": {"folder": str(folder)} | (files or {}), "access": keys | access})

    return start


@pytest.fixture(scope="module")
def client(serve: Callable[..., Any], folder: Path) -> Iterator[OpenAI]:
    with serve(folder, {"max_upload_mb": 0.01}) as url, client_at(url) as client:
        yield client


def client_at(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="ours", max_retries=0)


def create(client: OpenAI, num_bytes: int = 6) -> str:
    return client.uploads.create(bytes=num_bytes, **WHOLE).id  # type: ignore[arg-type]


def add(client: OpenAI, upload_id: str, data: bytes) -> str:
    return client.uploads.parts.create(upload_id, data=data).id


def raw(client: OpenAI, path: str, **how: Any) -> httpx.Response:
    """The answer to a POST that the client would not send."""
    headers = {"Authorization": f"Bearer {client.api_key}"}
    return httpx.post(f"{client.base_url}uploads{path}", headers=headers, timeout=60, **how)


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    body = answer.json()["error"]
    return answer.status_code, body["code"], body["param"]


def test_the_client_sends_a_file_in_parts_and_chats_about_it(client: OpenAI, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    md5 = hashlib.md5(TEXT).hexdigest()
    here: dict[str, Any] = {"mime_type": "text/plain", "purpose": "user_data", "part_size": 100, "md5": md5}
    by_path = client.uploads.upload_file_chunked(file=tmp_path / "a.txt", **here)
    in_memory = client.uploads.upload_file_chunked(file=TEXT, filename="b.txt", bytes=len(TEXT), **here)
    for upload, filename in ((by_path, "a.txt"), (in_memory, "b.txt")):
        assert (upload.status, upload.bytes, upload.filename) == ("completed", len(TEXT), filename)
        assert upload.file is not None and (upload.file.object, upload.file.filename) == ("file", filename)
        assert client.files.content(upload.file.id).read() == TEXT
        [left] = folder.glob(f"tenants/*/uploads/{upload.id}/*")
        assert left.name == "record.json"
    assert by_path.file is not None and in_memory.file is not None
    assert {by_path.file.id, in_memory.file.id} <= {file.id for file in client.files.list()}
    parts: Any = [{"type": "file", "file": {"file_id": by_path.file.id}}, {"type": "text", "text": "abc"}]
    chat = client.chat.completions.create(
        model="bytes", messages=[{"role": "user", "content": parts}], max_tokens=2, temperature=0
    )
    assert chat.usage is not None and chat.usage.prompt_tokens > len(TEXT) // 2


def test_an_upload_from_its_beginning_to_its_end(client: OpenAI) -> None:
    after: Any = {"anchor": "created_at", "seconds": 7200}
    upload = client.uploads.create(bytes=6, expires_after=after, **WHOLE)  # type: ignore[arg-type]
    assert (upload.object, upload.status, upload.bytes, upload.file) == ("upload", "pending", 6, None)
    assert upload.expires_at == upload.created_at + 3600
    second, first = (client.uploads.parts.create(upload.id, data=data) for data in (b"bca", b"abc"))
    assert (first.object, first.upload_id) == ("upload.part", upload.id) and first.id != second.id

    def opened() -> list[str]:
        listed = client.get("/uploads", cast_to=dict[str, Any])
        assert listed["object"] == "list" and not listed["has_more"]
        ids = [found["id"] for found in listed["data"]]
        assert [listed["first_id"], listed["last_id"]] == ([ids[0], ids[-1]] if ids else [None, None])
        return ids

    other = create(client)
    assert opened() == [other, upload.id]
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=hashlib.md5(b"abcbca").hexdigest())
    assert done.file is not None and client.files.content(done.file.id).read() == b"abcbca"
    assert done.file.expires_at == done.file.created_at + 7200
    assert client.uploads.cancel(other).status == "cancelled"
    assert opened() == []
    again = client.get(f"/uploads/{upload.id}", cast_to=dict[str, Any])
    assert (again["status"], again["file"]["id"]) == ("completed", done.file.id)


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ({"bytes": 0}, (400, "invalid_request", "bytes")),
        ({"bytes": "6"}, (400, "invalid_request", "bytes")),
        ({"bytes": 10_001}, (413, "request_too_large", "bytes")),
        ({"purpose": "fine-tune"}, (400, "invalid_request", "purpose")),
        ({"filename": ""}, (400, "invalid_request", "filename")),
        ({"mime_type": None}, (400, "invalid_request", "mime_type")),
        ({"mime": "text/plain"}, (400, "invalid_request", "mime")),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, (400, "invalid_request", "expires_after.seconds")),
        ({"expires_after": {"anchor": "now", "seconds": 7200}}, (400, "invalid_request", "expires_after.anchor")),
    ],
)
def test_what_cannot_be_announced(client: OpenAI, body: dict[str, Any], refusal: tuple[int, str, str]) -> None:
    assert error(raw(client, "", json={"bytes": 6, **WHOLE, **body})) == refusal


def test_what_cannot_be_a_part(client: OpenAI) -> None:
    upload_id = create(client)
    path = f"/{upload_id}/parts"
    assert error(raw(client, path, json={"data": "abc"})) == (415, "unsupported_media_type", None)
    for sent, param in (
        ({"files": {"file": ("a", b"abc")}}, "file"),
        ({"files": {"data": ("a", b"abc")}, "data": {"more": "1"}}, "more"),
        ({"files": {"data": (None, b"abc")}}, "data"),
        ({"files": {"data": ("a", b"")}}, "data"),
        ({"files": {"data": ("a", b"abcabca")}}, "data"),
    ):
        assert error(raw(client, path, **sent)) == (400, "invalid_request", param)
    add(client, upload_id, b"abcd")
    assert error(raw(client, path, files={"data": ("a", b"abc")})) == (400, "invalid_request", "data")
    client.uploads.cancel(upload_id)


def test_what_cannot_be_completed(client: OpenAI) -> None:
    upload_id = create(client)
    part_id, path = add(client, upload_id, b"abcab"), f"/{upload_id}/complete"
    last = add(client, upload_id, b"\0")
    for body, refusal in (
        ({}, (400, "invalid_request", "part_ids")),
        ({"part_ids": []}, (400, "invalid_request", "part_ids")),
        ({"part_ids": [part_id]}, (400, "invalid_request", "part_ids")),
        ({"part_ids": [part_id, "part_" + "0" * 32]}, (400, "invalid_request", "part_ids")),
        ({"part_ids": [part_id, last], "md5": "0" * 32}, (400, "invalid_request", "md5")),
        ({"part_ids": [part_id, last]}, (415, "unsupported_file", "part_ids")),  # a binary file
    ):
        assert error(raw(client, path, json=body)) == refusal
    assert client.get(f"/uploads/{upload_id}", cast_to=dict[str, Any])["status"] == "pending"
    client.uploads.cancel(upload_id)


@pytest.mark.parametrize("end", ["completed", "cancelled"])
def test_an_upload_that_has_ended_can_only_be_read(client: OpenAI, end: str) -> None:
    upload_id = create(client, 3)
    part_id = add(client, upload_id, b"abc")
    if end == "completed":
        client.uploads.complete(upload_id, part_ids=[part_id])
    else:
        client.uploads.cancel(upload_id)
    for ask in (
        lambda: client.uploads.complete(upload_id, part_ids=[part_id]),
        lambda: client.uploads.cancel(upload_id),
        lambda: add(client, upload_id, b"abc"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"is {end}") as caught:
            ask()
        assert caught.value.param == "upload_id"
    assert client.get(f"/uploads/{upload_id}", cast_to=dict[str, Any])["status"] == end


def test_an_upload_is_its_keys_own(client: OpenAI) -> None:
    upload_id = create(client, 3)
    part_id = add(client, upload_id, b"abc")
    theirs = client.with_options(api_key="theirs")
    assert theirs.get("/uploads", cast_to=dict[str, Any])["data"] == []
    for who, name in ((theirs, upload_id), (client, "upload_" + "0" * 32), (client, f"x{upload_id}"), (client, "..")):
        path = f"/{name.replace('.', '%2e')}"
        with pytest.raises(openai.NotFoundError):
            who.get(f"/uploads{path}", cast_to=object)
        for answer in (
            raw(who, f"{path}/parts", files={"data": ("a", b"abc")}),
            raw(who, f"{path}/complete", json={"part_ids": [part_id]}),
            raw(who, f"{path}/cancel"),
        ):
            assert error(answer) == (404, "upload_not_found", "upload_id")
    assert client.uploads.complete(upload_id, part_ids=[part_id]).status == "completed"


def test_what_is_announced_is_kept_free_of_files(serve: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path, {"max_stored_mb": 0.001}) as url, client_at(url) as client:
        data = b"a" * 400 + b"\n" * 200  # with its text, which has no end of line, it takes all of the room
        upload_id = create(client, len(data))
        for ask, param in (
            (lambda: client.files.create(file=("a.txt", b"a" * 401), purpose="user_data"), "file"),
            (lambda: create(client, 401), "bytes"),
        ):
            with pytest.raises(openai.APIStatusError, match="uploads that are open") as caught:
                ask()
            assert (caught.value.status_code, caught.value.code, caught.value.param) == (
                413,
                "storage_limit_exceeded",
                param,
            )
        done = client.uploads.complete(upload_id, part_ids=[add(client, upload_id, data)])
        assert done.status == "completed"
        with pytest.raises(openai.APIStatusError, match="delete some first"):
            create(client, 1)
        assert done.file is not None and client.files.delete(done.file.id).deleted
        client.uploads.cancel(create(client, 1000))


def test_parts_cost_nothing_and_the_file_its_tokens(serve: Callable[..., Any], tmp_path: Path) -> None:
    data = b"abc " * 500
    with serve(tmp_path, tokens_per_minute=1000) as url, client_at(url) as client:
        upload_id = create(client, len(data))
        part = client.uploads.parts.with_raw_response.create(upload_id, data=data)
        assert int(part.headers["x-ratelimit-remaining-tokens"]) > 900  # its bytes would be 500 tokens
        done = client.uploads.with_raw_response.complete(upload_id, part_ids=[part.parse().id])
        assert done.headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_file_in_one_piece_costs_the_tokens_of_its_text(serve: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path, tokens_per_minute=1000) as url, client_at(url) as client:
        stored = client.files.with_raw_response.create(file=("a.txt", b"abc " * 500), purpose="user_data")
        assert stored.headers["x-ratelimit-remaining-tokens"] == "0"  # its bytes would be 500 tokens
