from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from retrieval import RetrievalError, RetrievalOptions, Retriever
from retrieval.device import DeviceTurns
from retrieval.embedding import Embedder, load_embedder
from retrieval.reranking import load_reranker
from retrieval.store import ChunkStore


@pytest.fixture(scope="module")
def dense(minilm):
    return load_embedder(minilm)


TEXTS = ["the white whale", "over the wide sea " * 30, "sea", "whale whale whale swims over the sea"]


def test_vectors_are_unit_float32_in_the_order_of_the_texts(dense):
    vectors = dense.embed(TEXTS)
    assert vectors.shape == (4, 384) and vectors.dtype == np.float32 and dense.dimension == 384
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(dense.embed_query(text), vector, atol=1e-5)


def test_no_texts_are_no_rows(dense):
    assert dense.embed([]).shape == (0, 384)


def test_a_folder_of_sentence_transformers_sets_its_own_pooling_and_length(dense, minilm):
    from FlagEmbedding import FlagModel

    reference = FlagModel(str(minilm), pooling_method="mean", devices="cpu", use_fp16=False)
    long = " ".join(str(i) for i in range(1000))
    assert dense.max_tokens == 256
    expected = reference.encode([*TEXTS, long], max_length=256)
    np.testing.assert_allclose(dense.embed([*TEXTS, long]), expected, atol=1e-5)
    np.testing.assert_array_equal(dense.embed([long]), dense.embed([long + " and more"]))


def test_lengths_are_those_of_the_tokenizer(dense, minilm):
    texts = [*TEXTS, "", "\ud800", " ".join(str(i) for i in range(1000))]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected = [len(tokenizer(text.replace("\ud800", "?"), verbose=False)["input_ids"]) for text in texts]
    dense.embed(texts)  # which sets the tokenizer to cut texts off
    assert dense.lengths(texts) == expected


def test_a_text_far_too_long_is_not_tokenised_to_its_end(dense, monkeypatch):
    """Two million tokens would be a gigabyte, in which the interpreter does nothing else."""
    read = []

    class Tokenizer:
        def __call__(self, texts, **how):
            read.extend(map(len, texts))
            return tokenizer(texts, **how)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    long, begins = "a b c d " * 250_000, "a b c d " * 250
    tokenizer = dense._tokenizer
    monkeypatch.setattr(dense, "_tokenizer", Tokenizer())
    np.testing.assert_allclose(dense.embed([long]), dense.embed([begins]), atol=1e-5)
    np.testing.assert_allclose(dense.embed_query(long), dense.embed_query(begins), atol=1e-5)
    assert max(read) <= 64 * dense.max_tokens
    monkeypatch.setitem(vars(dense), "_counting", None)  # nothing is counted
    assert dense.lengths([long]) == [dense.max_tokens + 1]


def test_meaning_is_near_meaning(dense):
    query = dense.embed_query("Who hunts the whale?")
    near, far = dense.embed(["The captain chases whales with harpoons.", "Interest rates rose in March."]) @ query
    assert near > 0.4 > 0.2 > far


def test_bge_m3_is_recognised_and_gives_its_dense_vectors(bge_m3):
    from FlagEmbedding import BGEM3FlagModel

    embedder = load_embedder(bge_m3)
    assert (embedder.dimension, embedder.max_tokens) == (32, 64)
    reference = BGEM3FlagModel(str(bge_m3), devices="cpu", use_fp16=False)
    expected = reference.encode(TEXTS, max_length=64)["dense_vecs"]
    np.testing.assert_allclose(embedder.embed(TEXTS), expected, atol=1e-5)


def test_the_length_to_read_can_be_chosen(bge_m3):
    embedder = load_embedder(bge_m3, max_tokens=4)
    np.testing.assert_array_equal(embedder.embed_query("sea " * 10), embedder.embed_query("sea " * 20))
    for max_tokens in (0, 65):
        with pytest.raises(ValueError, match="max_tokens"):
            load_embedder(bge_m3, max_tokens=max_tokens)


def test_a_tokenizer_that_declares_no_length_means_512_tokens(bge_m3, tmp_path):
    folder = tmp_path / "no-length"
    shutil.copytree(bge_m3, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_embedder(folder).max_tokens == 512


def test_it_is_quiet_and_starts_no_process(dense, capfd, monkeypatch):
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", lambda self: pytest.fail("started a process"))
    dense.embed(["a text"] * 300)
    assert capfd.readouterr() == ("", "")


def test_a_lone_surrogate_is_read_as_an_unknown_character(dense):
    assert np.isfinite(dense.embed_query("whale \ud800")).all()


def test_what_was_embedded_lately_is_remembered(dense, monkeypatch):
    """Each text is embedded once, however often it is asked for; the longest unused is forgotten first."""
    monkeypatch.setattr("retrieval.embedding._REMEMBERED", 3)
    passes = []

    def forward(inputs) -> torch.Tensor:
        passes.append(len(inputs["input_ids"]))
        return inputs["input_ids"][:, 1:3]

    embedder = Embedder("ids", tokenizer=dense._tokenizer, forward=forward, max_tokens=8, device="cpu")
    passes.clear()
    expected = {text: embedder.embed_query(text) for text in ("whale", "sea", "ship", "mast")}
    for texts, new in (
        (["whale", "sea", "whale"], 2),
        (["sea", "whale"], 0),
        (["ship", "whale"], 1),
        (["mast"], 1),  # and sea is forgotten
        (["whale", "ship", "mast"], 0),
        (["sea"], 1),
    ):
        passes.clear()
        np.testing.assert_array_equal(embedder.embed(texts), [expected[text] for text in texts])
        assert sum(passes) == new


def test_threads_take_turns_at_the_device(dense):
    inside, wrong = [], []

    def forward(inputs) -> torch.Tensor:
        inside.append(1)
        time.sleep(0.005)
        wrong.extend(inside[1:])
        inside.pop()
        return inputs["input_ids"][:, 1:3]

    embedder = Embedder("ids", tokenizer=dense._tokenizer, forward=forward, max_tokens=8, device="cpu")
    expected = embedder.embed(TEXTS)

    def work(i: int) -> None:
        for _ in range(10):
            if not np.array_equal(embedder.embed_query(TEXTS[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_document_of_one_chunk_does_not_go_before_others(dense, monkeypatch):
    asked, turn = [], dense.passes.turn
    monkeypatch.setattr(dense.passes, "turn", lambda *, is_query: asked.append(is_query) or turn(is_query=is_query))
    dense.embed(["a text of one chunk that nobody has embedded before"])
    dense.embed_query("where is the whale?")
    assert asked == [False, True]


@pytest.mark.parametrize(("num_waiting", "sizes"), [(0, [10, 2]), (1, [5, 5, 2])])
def test_passes_are_small_where_others_wait(dense, num_waiting, sizes):
    passes: list[int] = []

    def forward(inputs) -> torch.Tensor:
        passes.append(len(inputs["input_ids"]))
        return inputs["input_ids"][:, 1:3]

    embedder = Embedder("ids", tokenizer=dense._tokenizer, forward=forward, max_tokens=50, device="cpu")
    passes.clear()
    embedder.passes._num_waiting = num_waiting
    embedder.embed([f"{i} " + "whale " * 60 for i in range(12)])
    assert passes == sizes


@pytest.mark.parametrize("model", ["/no/such/folder", "too/many/parts"])
def test_a_missing_model_is_named(model):
    with pytest.raises(RetrievalError, match=f"{model}.*not a folder"):
        load_embedder(model)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json", "sparse_linear.pt"])
def test_a_broken_folder_is_named(bge_m3, broken, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(bge_m3, folder)
    (folder / broken).write_bytes(b"{ not what it was")
    with pytest.raises(RetrievalError, match=f"{folder}.*cannot be loaded"):
        load_embedder(folder)


def test_a_pooling_that_is_not_known_is_refused(bge_m3, tmp_path):
    folder = tmp_path / "max-pooling"
    shutil.copytree(bge_m3, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(RetrievalError, match="pooling_mode_max_tokens"):
        load_embedder(folder, kind="dense")


def test_bge_m3s_token_weights_are_flag_embeddings(bge_m3):
    from FlagEmbedding import BGEM3FlagModel

    embedder = load_embedder(bge_m3)
    reference = BGEM3FlagModel(str(bge_m3), devices="cpu", use_fp16=False)
    expected = reference.encode(TEXTS, max_length=64, return_sparse=True)["lexical_weights"]
    assert embedder.has_sparse
    embedder.embed(TEXTS[:2])  # their weights are known from this pass
    for vector, weights in zip(embedder.sparse(TEXTS), expected, strict=True):
        assert vector.indices.tolist() == sorted(int(token) for token in weights) and len(weights)
        np.testing.assert_allclose(vector.values, [weights[str(i)] for i in vector.indices], rtol=1e-4)


def test_weights_that_are_known_need_no_pass(bge_m3, monkeypatch):
    embedder = load_embedder(bge_m3)
    embedder.embed(TEXTS)
    passes = []
    monkeypatch.setattr(embedder, "passes", DeviceTurns(lambda forward: passes.append(1) or forward()))
    embedder.sparse(TEXTS)
    assert passes == []
    embedder.sparse(["sea whale"])
    assert passes == [1]


def test_what_is_remembered_is_found_with_the_same_salt_alone(bge_m3, monkeypatch):
    embedder = load_embedder(bge_m3)
    passes = []
    monkeypatch.setattr(embedder, "passes", DeviceTurns(lambda forward: passes.append(1) or forward()))

    def num_passes(ask, *args) -> int:
        passes.clear()
        ask(*args)
        return len(passes)

    salts = ("", "a", "b", "a", "b", "")
    assert [num_passes(embedder.embed, TEXTS, salt) for salt in salts] == [1, 1, 1, 0, 0, 0]
    assert [num_passes(embedder.sparse, TEXTS, salt) for salt in ("", "a", "c")] == [0, 0, 1]
    embedder.embed_query("Who is the captain?", "a")
    assert [num_passes(embedder.sparse, ["Who is the captain?"], salt) for salt in "ab"] == [0, 1]


def test_late_interaction_is_flag_embeddings_colbert_score(bge_m3):
    from FlagEmbedding import BGEM3FlagModel

    embedder = load_embedder(bge_m3)
    reference = BGEM3FlagModel(str(bge_m3), devices="cpu", use_fp16=False)
    asked, *passages = reference.encode(["white whale", *TEXTS], max_length=64, return_colbert_vecs=True)[
        "colbert_vecs"
    ]
    expected = [float(reference.colbert_score(asked, passage)) for passage in passages]
    np.testing.assert_allclose(embedder.late_interaction("white whale", TEXTS), expected, atol=1e-5)


def test_bge_m3_retrieves_by_its_own_weights(bge_m3, tokenizer):
    """All three methods and ColBERT, end to end, on random weights: as the embedder's own numbers order the chunks."""
    embedder = load_embedder(bge_m3)
    store = ChunkStore(dimension=32, idf=False)
    rerank = load_reranker("colbert", embedder)
    contents, query = ["the white whale", "over the wide sea", "whale whale swims", "sea sea the"], "white whale"
    [asked], passages = embedder.sparse([query]), embedder.sparse(contents)
    dots = []
    for each in passages:
        weights = dict(zip(each.indices.tolist(), each.values.tolist(), strict=True))
        dots.append(
            sum(w * weights.get(i, 0) for i, w in zip(asked.indices.tolist(), asked.values.tolist(), strict=True))
        )
    options = RetrievalOptions(method="sparse", max_tokens=1000, chunk_tokens=64)
    plain, late = Retriever(embedder, store, tokenizer), Retriever(embedder, store, tokenizer, rerank=rerank)
    found = plain.retrieve(contents, query, options)
    assert {chunk.position: chunk.score for chunk in found.chunks} == pytest.approx(
        {i: dot for i, dot in enumerate(dots) if dot}, rel=1e-3
    )
    scores = embedder.late_interaction(query, contents)
    best = late.retrieve(contents, query, replace(options, method="hybrid", threshold=-1, max_tokens=9))
    assert int(np.argmax(scores)) in [chunk.position for chunk in best.chunks]
