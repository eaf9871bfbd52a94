"""`rapid datastore`: what it builds, what it says, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import Datastore
from rapid.text.tokenizer import fingerprint, load_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    (folder / "more" / "b.md").write_text("It is a truth universally acknowledged.")
    (folder / "c.bin").write_bytes(b"\0\1")
    return folder


def test_a_folder_of_texts_becomes_a_datastore_and_files_are_replaced(
    run: Run, texts: Path, tmp_path: Path, bytes_folder: Path
) -> None:
    out = tmp_path / "store"
    build = ["datastore", "build", str(texts), "--out", str(out), "--target", str(bytes_folder)]
    code, said, _ = run(*build, "--json")
    assert code == 0
    tokenizer = load_tokenizer(str(bytes_folder))
    built = json.loads(said)
    num_tokens = 63 + 39
    assert (built["texts"], built["tokens"], built["tokenizer"]) == (2, num_tokens, fingerprint(tokenizer))
    assert built["bytes"] > 8 * num_tokens and built["seconds"] > 0
    (texts / "a.txt").write_text("Call me Ahab.")
    assert run(*build)[0] == 0
    code, said, _ = run("datastore", "info", str(out), "--json")
    assert code == 0 and (json.loads(said)["texts"], json.loads(said)["tokens"]) == (2, 13 + 39)
    found = Datastore(DatastoreFolder(out, fingerprint(tokenizer)).segments()).find(tokenizer.encode("Call me"))
    assert found is not None and tokenizer.decode(found.tokens) == " Ahab."
    assert "tokens      52" in run("datastore", "info", str(out))[1]


def test_what_is_wrong_is_one_line(run: Run, texts: Path, tmp_path: Path, bytes_folder: Path) -> None:
    def error(*args: str) -> str:
        code, _, err = run("datastore", *args)
        assert code == 2
        return err.splitlines()[-1]

    assert "holds no datastore" in error("info", str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    built = ["--out", str(tmp_path / "store"), "--target", str(bytes_folder)]
    assert "holds no .txt and no .md file" in error("build", str(tmp_path / "empty"), *built)
    assert "cannot be read" in error("build", str(tmp_path / "absent.txt"), *built)
    assert "is not plain text" in error("build", str(texts / "c.bin"), *built)


def test_a_datastore_of_another_model_stays_as_it_is(run: Run, texts: Path, tmp_path: Path, bytes_folder: Path) -> None:
    out = tmp_path / "store"
    DatastoreFolder(out, "another").add("text", [1, 2, 3])
    code, _, err = run("datastore", "build", str(texts), "--out", str(out), "--target", str(bytes_folder))
    assert code == 1 and "made for the tokenizer another" in err
