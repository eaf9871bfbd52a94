"""On a cross-encoder of random weights: the numbers are FlagEmbedding's, and nothing is said about quality."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from retrieval import RetrievalError
from retrieval.device import DeviceTurns
from retrieval.embedding import load_embedder
from retrieval.reranking import load_reranker

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PASSAGES = ["the white whale", "over the wide sea " * 9, "sea", "whale swims", "the sea the sea", "white sea \ud800"]


def cross_encoder(folder, tokenizer_of, num_labels: int):
    torch.manual_seed(1)
    config = XLMRobertaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1, num_labels=num_labels, initializer_range=0.5,
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_of / name, folder)
    return folder


@pytest.fixture(scope="module")
def reranker(bge_m3, tmp_path_factory):
    return cross_encoder(tmp_path_factory.mktemp("reranker"), bge_m3, 1)


def test_scores_are_flag_embeddings_in_the_order_of_the_passages(reranker, bge_m3, capfd):
    from FlagEmbedding import FlagReranker

    rerank = load_reranker(str(reranker), load_embedder(bge_m3))
    capfd.readouterr()
    scores = rerank("white whale", PASSAGES)
    assert capfd.readouterr() == ("", "")  # no bars
    reference = FlagReranker(str(reranker), devices="cpu", use_fp16=False, max_length=64)
    readable = [passage.replace("\ud800", "?") for passage in PASSAGES]
    expected = [reference.compute_score([("white whale", passage)])[0] for passage in readable]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(scores) > 1e-3 and rerank("white whale", []) == []


def test_passes_take_turns_with_the_embedders(reranker, bge_m3):
    embedder = load_embedder(bge_m3)
    rerank, passes = load_reranker(str(reranker), embedder), []
    turns = embedder.passes = DeviceTurns(lambda forward: passes.append(turns._is_taken) or forward())
    rerank("whale", PASSAGES)
    assert passes == [True, True]  # of four and two passages


def test_what_is_no_reranker_is_refused_by_name(bge_m3, minilm, reranker, tmp_path):
    embedder = load_embedder(bge_m3)
    with pytest.raises(RetrievalError, match="3 outputs"):
        load_reranker(str(cross_encoder(tmp_path, bge_m3, 3)), embedder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RetrievalError, match="cannot be loaded"):
        load_reranker(str(tmp_path), embedder)
    with pytest.raises(RetrievalError, match="needs BGE-M3"):
        load_reranker("colbert", load_embedder(minilm))
