"""Files over HTTP: read and embedded once, found by chats, seen by nobody else, and gone when they are deleted."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pypdf import PdfReader, PdfWriter
from served import MODEL, QUESTION, document, embedded, local_api

from retrieval.embedding import Embedder

ENGINE = {"model": MODEL, "dtype": "float32", "kv_memory_gib": 1}
OPTIONS = {"chunk_tokens": 64, "min_tokens": 192, "threshold": 0.1}
CONFIG = {
    "target": ENGINE,
    "colocated": True,
    "retriever": {"long_content_tokens": 256, "options": OPTIONS},
    "access": {"api_keys": ["ours", "theirs"], "isolation": "shared"},
}
TEXT = document(3)


def client_at(url: str, key: str = "ours") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def upload(client: OpenAI, content: str | bytes, name: str = "a.txt") -> str:
    data = content.encode() if isinstance(content, str) else content
    return client.files.create(file=(name, data), purpose="user_data").id


def rapid(file: Any) -> dict[str, Any]:
    return file.model_extra["rapid"]


def about(file: dict[str, Any], question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": [{"type": "file", "file": file}, {"type": "text", "text": question}]}]


def ask(client: OpenAI, messages: list[Any], **rapid: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, extra_body={"rapid": rapid}
    )


def config_in(folder: Path, **files: Any) -> dict[str, Any]:
    return {**CONFIG, "files": {"folder": str(folder), **files}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "files"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[OpenAI]:
    with local_api(config_in(folder)) as url, client_at(url) as client:
        yield client


def place_of(folder: Path, data: bytes) -> Path:
    return folder / "contents" / hashlib.sha256(data).hexdigest()


def num_embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every text embedded from now on is added to."""
    texts: list[str] = []
    embed = Embedder.embed

    def counting(self: Embedder, new: Any, salt: str = "") -> Any:
        texts.extend(new)
        return embed(self, new, salt)

    monkeypatch.setattr(Embedder, "embed", counting)
    return texts


def test_a_file_answers_like_the_same_text_and_is_embedded_once_across_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, config = num_embedded(monkeypatch), config_in(tmp_path)
    with local_api(config) as url, client_at(url) as client:
        file = embedded(client, upload(client, TEXT))
        assert (file.status, file.bytes, rapid(file)["progress"]) == ("processed", len(TEXT.encode()), 1.0)
        assert len(texts) == rapid(file)["chunks"] > 4
        again = embedded(client, upload(client, TEXT, "another name.txt"))
        before = ask(client, about({"file_id": file.id}), strategy="rag")
        assert len(texts) == rapid(file)["chunks"] and again.id != file.id
        pasted = ask(client, [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}], strategy="autoregressive")
        referred = ask(client, about({"file_id": file.id}), strategy="autoregressive")
        assert referred.choices[0].message == pasted.choices[0].message
        assert referred.usage.prompt_tokens == pasted.usage.prompt_tokens

    texts.clear()
    with local_api(config) as url, client_at(url) as client:
        assert client.files.retrieve(file.id) == file
        after = ask(client, about({"file_id": file.id}), strategy="rag")
        assert texts == [] and after.choices[0].message == before.choices[0].message
        assert rapid(after)["chunks"] == rapid(before)["chunks"] != []
        assert client.files.content(file.id).read() == TEXT.encode()
        assert {f.id for f in client.files.list()} == {file.id, again.id}


def test_a_file_is_its_keys_own(client: OpenAI) -> None:
    file_id = upload(client, TEXT)
    theirs = client.with_options(api_key="theirs")
    for refused in (
        lambda: theirs.files.retrieve(file_id),
        lambda: theirs.files.content(file_id),
        lambda: theirs.files.delete(file_id),
        lambda: ask(theirs, about({"file_id": file_id})),
        lambda: theirs.post(f"/files/{file_id}/warm", cast_to=object),
        lambda: client.files.retrieve("file-" + "0" * 32),
        lambda: client.files.retrieve("..%2f..%2flock"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            refused()
    assert theirs.files.list().data == []
    with pytest.raises(openai.NotFoundError) as caught:
        ask(theirs, about({"file_id": file_id}))
    assert caught.value.param == "messages.0.content.0.file.file_id" and caught.value.code == "file_not_found"
    assert client.files.retrieve(file_id).id == file_id


def test_a_warmed_file_is_read_already(client: OpenAI) -> None:
    file_id = upload(client, document(4))
    warmed = client.post(f"/files/{file_id}/warm", cast_to=dict[str, Any])
    answer = ask(client, about({"file_id": file_id}), strategy="autoregressive")
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert warmed["prompt_tokens"] - 16 <= cached <= warmed["prompt_tokens"] < answer.usage.prompt_tokens


def test_deleting_removes_the_text_the_vectors_and_the_keys_and_values(client: OpenAI, folder: Path) -> None:
    text, others = document(5), set(folder.glob("vectors/*"))
    ours, copy = upload(client, text), upload(client.with_options(api_key="theirs"), text)
    embedded(client, ours)
    question = [{"role": "user", "content": f"What is this?\n\n{text}"}]
    for messages in (about({"file_id": ours}), question):
        ask(client, messages, strategy="autoregressive")
        ask(client, messages, strategy="rag")
    assert client.files.delete(ours).deleted

    def cached(messages: list[Any]) -> int:
        return ask(client, messages, strategy="autoregressive").usage.prompt_tokens_details.cached_tokens

    # Somebody else still has it.
    assert cached(question) > 300
    assert place_of(folder, text.encode()).is_dir() and set(folder.glob("vectors/*")) > others
    assert client.with_options(api_key="theirs").files.delete(copy).deleted
    assert cached(question) < 48  # the template's own beginning, and the question
    assert not place_of(folder, text.encode()).exists() and set(folder.glob("vectors/*")) == others
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ours)


def pdf_of(text: str, password: str | None = None) -> bytes:
    """One page that shows ``text``."""
    shown = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(shown), shown),
    ]
    whole, places = b"%PDF-1.4\n", []
    for i, item in enumerate(objects, 1):
        places.append(len(whole))
        whole += b"%d 0 obj\n%s\nendobj\n" % (i, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    whole += b"xref\n0 5\n0000000000 65535 f \n%strailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(whole),
    )
    if password is None:
        return whole
    writer, encrypted = PdfWriter(PdfReader(io.BytesIO(whole))), io.BytesIO()
    writer.encrypt(password)
    writer.write(encrypted)
    return encrypted.getvalue()


HTML = b"<!DOCTYPE html><title>Whales</title><script>x()</script><h1>Ahab</h1><p>He has <b>one</b> leg.<ul><li>ivory"


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"\xef\xbb\xbf# Ahab\r\n\r\none leg", "text/plain", "# Ahab\n\none leg"),
        (HTML, "text/html", "Whales\n\n# Ahab\n\nHe has **one** leg.\n\n* ivory"),
        (pdf_of("Ahab has one leg."), "application/pdf", "Ahab has one leg."),
    ],
    ids=["markdown", "html", "pdf"],
)
def test_text_is_read_from(data: bytes, kind: str, text: str, client: OpenAI, folder: Path) -> None:
    file_id = upload(client, data, "anything.bin")
    assert rapid(client.files.retrieve(file_id))["media_type"] == kind
    assert (place_of(folder, data) / "text").read_text(encoding="utf-8") == text
    inline = {"file_data": f"data:{kind};base64,{base64.b64encode(data).decode()}", "filename": "x"}
    answers = [ask(client, about(file), strategy="autoregressive") for file in ({"file_id": file_id}, inline)]
    assert answers[0].choices[0].message == answers[1].choices[0].message


def test_what_cannot_be_read_is_refused_with_the_reason(client: OpenAI, folder: Path) -> None:
    before, blank = set(folder.rglob("*")), io.BytesIO()
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(blank)
    for data, name, status, reason in (
        (b"MZ\x90\x00\x03", "notes.txt", 415, "binary"),
        (b"PK\x03\x04..", "report.docx", 415, "ZIP"),
        ("café".encode("latin-1"), "a.txt", 415, "not UTF-8"),
        (b"just text", "a.pdf", 415, "named .pdf"),
        (b" \n", "a.txt", 400, "no text"),
        (blank.getvalue(), "scan.pdf", 400, "OCR"),
        (pdf_of("secret", password="x"), "a.pdf", 400, "encrypted"),
        (b"%PDF-1.7 and then nothing", "a.pdf", 400, "damaged"),
    ):
        with pytest.raises(openai.APIStatusError, match=reason) as caught:
            upload(client, data, name)
        assert (caught.value.status_code, caught.value.param) == (status, "file")
    assert set(folder.rglob("*")) == before


def test_a_file_that_takes_too_long_to_read_is_given_up(tmp_path: Path) -> None:
    with (
        local_api(config_in(tmp_path, read_timeout_s=0.01)) as url,
        client_at(url) as client,
        pytest.raises(openai.BadRequestError, match="longer than"),
    ):
        upload(client, HTML)


SOON = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}
NEVER = {"expires_after[seconds]": "3600"}


def test_requests_that_make_no_sense_name_the_field(client: OpenAI) -> None:
    url, headers = str(client.base_url), {"Authorization": "Bearer ours"}
    file = {"file": ("a.txt", b"text")}
    for answer, status, param in (
        (httpx.post(f"{url}files", json={}, headers=headers), 415, None),
        (httpx.post(f"{url}files", files={"other": b"x"}, headers=headers), 400, "other"),
        (httpx.post(f"{url}files", files={"purpose": (None, "user_data")}, headers=headers), 400, "file"),
        (httpx.post(f"{url}files", files=file, data=SOON, headers=headers), 400, "expires_after[seconds]"),
        (httpx.post(f"{url}files", files=file, data=NEVER, headers=headers), 400, "expires_after[anchor]"),
        (httpx.post(f"{url}files", files=file, data={"purpose": "fine-tune"}, headers=headers), 400, "purpose"),
        (httpx.post(f"{url}files", files=file, data={"expires": "1"}, headers=headers), 400, "expires"),
        (httpx.get(f"{url}files?limit=0", headers=headers), 400, "limit"),
        (httpx.get(f"{url}files?order=up", headers=headers), 400, "order"),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    for file_part, param in (
        ({"file_data": "data:text/plain;base64,%%%"}, "messages.0.content.0.file.file_data"),
        ({"file_data": "data:text/plain,hello"}, "messages.0.content.0.file.file_data"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, about(file_part))
        assert caught.value.param == param
    wrong_role = [
        *about({"file_data": "eA=="}),
        {"role": "assistant", "content": about({"file_data": "eA=="})[0]["content"]},
    ]
    with pytest.raises(openai.BadRequestError, match="assistant message cannot hold a file"):
        ask(client, wrong_role)
    with pytest.raises(openai.BadRequestError, match="either file_id or file_data"):
        ask(client, about({}))


def test_lists_are_paged(client: OpenAI) -> None:
    ids = [upload(client, f"text {n}") for n in range(3)]
    assert {file.id for file in client.files.list(limit=2)} >= set(ids)  # the client asks for every page
    first = client.files.list(limit=2, order="asc")
    assert len(first.data) == 2 and first.has_more
    assert [f.id for f in client.files.list(order="desc")] == [f.id for f in client.files.list(order="asc")][::-1]
    assert client.files.list(purpose="assistants").data == []


def test_a_key_has_only_so_much_room(tmp_path: Path) -> None:
    room = 3.5 * len(TEXT.encode()) / 1e6  # a file takes its bytes and those of its text
    with local_api(config_in(tmp_path, max_stored_mb=room)) as url, client_at(url) as client:
        upload(client, TEXT)
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, TEXT.swapcase())
        assert (caught.value.status_code, caught.value.code) == (413, "storage_limit_exceeded")
        upload(client.with_options(api_key="theirs"), TEXT)


def test_an_upload_says_when_it_expires_unless_the_configuration_is_stricter(tmp_path: Path) -> None:
    with local_api(config_in(tmp_path, expire_after_s=7200)) as url, client_at(url) as client:
        for seconds, expected in ((3600, 3600), (36_000, 7200)):
            after = {"anchor": "created_at", "seconds": seconds}
            file = client.files.create(
                file=("a.txt", b"text"),
                purpose="user_data",
                expires_after=after,  # type: ignore[arg-type]
            )
            assert file.expires_at == file.created_at + expected
            assert client.files.retrieve(file.id).expires_at == file.expires_at


def test_a_key_has_only_so_many_files(tmp_path: Path) -> None:
    with local_api(config_in(tmp_path, max_files=2)) as url, client_at(url) as client:
        first, _ = upload(client, b"one"), upload(client, b"two")
        with pytest.raises(openai.APIStatusError, match="2 files") as caught:
            upload(client, b"three")
        assert caught.value.status_code == 413
        client.files.delete(first)
        upload(client, b"three")
