"""A datastore in a folder: what comes, what goes, and that nothing of it stays."""

from __future__ import annotations

import itertools
import random
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import SEPARATOR, Datastore
from rapid.errors import ModelFileError, ModelMismatch


def held(folder: DatastoreFolder) -> list[list[int]]:
    """The texts in the segments' own arrays, in order."""
    texts: list[list[int]] = []
    for segment in folder.segments():
        ends = np.flatnonzero(segment.tokens == SEPARATOR)
        texts += [part[part != SEPARATOR].tolist() for part in np.split(segment.tokens, ends + 1) if len(part)]
        suffixes = [segment.tokens[place:].tolist() for place in segment.suffixes]
        assert suffixes == sorted(suffixes)
    return sorted(texts)


def on_disk(path: Path, tokens: list[int]) -> bool:
    wanted = np.array(tokens, np.uint32).tobytes()
    return any(wanted in file.read_bytes() for file in path.iterdir())


def test_texts_come_and_go_in_any_order(tmp_path: Path) -> None:
    rng, folder = random.Random(0), DatastoreFolder(tmp_path / "store", "tokenizer", max_segment_tokens=200)
    expected: dict[str, list[int]] = {}
    for step in range(120):
        name = f"text {rng.randrange(20)}"
        if name in expected and rng.random() < 0.5:
            folder.remove(name)
            del expected[name]
        else:
            expected[name] = [step] * 3 + [rng.randrange(9) for _ in range(rng.randint(0, 40))]
            folder.add(name, expected[name])
        assert held(folder) == sorted(expected.values())
    assert {text.name for text in folder.texts()} == expected.keys()
    assert held(DatastoreFolder(tmp_path / "store", "tokenizer")) == sorted(expected.values())  # another process's


def test_there_are_few_segments_and_none_is_larger_than_it_may_be(tmp_path: Path) -> None:
    folder = DatastoreFolder(tmp_path, "tokenizer", max_segment_tokens=1000)
    for i in range(200):
        folder.add(str(i), [i] * 20)
        assert len(list(tmp_path.glob("*.npy"))) == len(folder.segments())  # what was taken in is gone at once
    sizes = [len(segment.tokens) for segment in folder.segments()]
    assert sum(sizes) == 200 * 21
    assert max(sizes) <= 1000 + 50 and len(sizes) < 15  # separators are not counted


def test_a_text_longer_than_a_segment_is_cut_and_goes_as_one(tmp_path: Path) -> None:
    folder = DatastoreFolder(tmp_path, "tokenizer", max_segment_tokens=100)
    folder.add("long", list(range(250)))
    assert held(folder) == [list(range(100)), list(range(100, 200)), list(range(200, 250))]
    folder.remove("long")
    assert folder.segments() == [] and folder.texts() == []


def test_what_is_removed_is_on_the_disk_no_more_and_takes_along_what_was_made_of_it(tmp_path: Path) -> None:
    folder = DatastoreFolder(tmp_path, "tokenizer")
    secret, quote, other = [7, 7, 1, 2, 3], [9, 7, 7, 1, 9], [4, 5, 6]
    folder.add("file", secret)
    folder.add("answer", quote, sources=["file", "another file"])
    folder.add("other", other)
    reader = DatastoreFolder(tmp_path, "tokenizer")
    assert Datastore(reader.segments()).find([7, 7]) is not None
    folder.remove("file")
    assert not on_disk(tmp_path, secret) and not on_disk(tmp_path, quote) and on_disk(tmp_path, other)
    assert Datastore(reader.segments()).find([7, 7]) is None
    assert Datastore(reader.segments()).find([4, 5]) is not None
    folder.remove("file")  # again: nothing happens
    DatastoreFolder(tmp_path / "absent").remove("file")
    assert not (tmp_path / "absent").exists()


def test_what_a_writer_left_that_died_is_removed_with_the_next_removal(tmp_path: Path) -> None:
    folder = DatastoreFolder(tmp_path, "tokenizer")
    folder.add("kept", [1, 2, 3])
    np.save(tmp_path / "unfinished.npy", np.array([5, 6, 7], np.uint32))
    assert held(folder) == [[1, 2, 3]]
    folder.remove("anything")
    assert not on_disk(tmp_path, [5, 6, 7]) and held(folder) == [[1, 2, 3]]


def test_the_oldest_texts_go_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    folder = DatastoreFolder(tmp_path, "tokenizer")
    for i in range(10):
        folder.add(f"answer {i}", [i] * 10)
        folder.trim(80)
    assert {text.name for text in folder.texts()} == {f"answer {i}" for i in range(3, 10)}


def test_a_datastore_of_another_tokenizer_is_refused_with_both_names(tmp_path: Path) -> None:
    DatastoreFolder(tmp_path, "ours").add("text", [1, 2, 3])
    other = DatastoreFolder(tmp_path, "theirs")
    for refused in (other.segments, lambda: other.add("more", [1])):
        with pytest.raises(ModelMismatch, match=r"tokenizer ours, .* theirs: build it anew"):
            refused()
    DatastoreFolder(tmp_path).remove("text")  # which needs no tokenizer
    assert other.segments() == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 9, "tokenizer": "t", "texts": []}'])
def test_a_folder_that_holds_something_else_is_refused_by_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "segment.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"segment\.json"):
        DatastoreFolder(tmp_path, "t").segments()


def test_a_segment_that_was_cut_short_is_refused_by_its_file(tmp_path: Path) -> None:
    folder = DatastoreFolder(tmp_path, "t")
    folder.add("text", list(range(100)))
    arrays = next(tmp_path.glob("*.npy"))
    arrays.write_bytes(arrays.read_bytes()[:200])
    with pytest.raises(ModelFileError, match=r"\.npy cannot be read"):
        DatastoreFolder(tmp_path, "t").segments()


def _add_some(path: Path, who: int) -> None:
    folder = DatastoreFolder(path, "tokenizer")
    for i in range(8):
        folder.add(f"{who} {i}", [who, i])


def test_several_processes_add_to_one_folder(tmp_path: Path) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=_add_some, args=(tmp_path, who)) for who in range(2)]
    for process in processes:
        process.start()
    _add_some(tmp_path, 2)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = sorted([who, i] for who in range(3) for i in range(8))
    assert held(DatastoreFolder(tmp_path, "tokenizer")) == expected
