"""Vectors of texts, and documents by their worth: by the retriever's own models, bounded and paid for as all else."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from served import local_api
from transformers import AutoModel, AutoTokenizer

from deployments.embedding import TextModels
from rapid.weights.embedded_models import local_path
from retrieval import Retriever, TextLengths

TEXTS = ["The cat sat on the mat.", "Interest rates rose again.", "Ein Satz — mit Umlauten: äöü."]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """[3, d]: the same by transformers alone: mean over the tokens, of length 1."""
    folder = local_path("all-minilm-l6-v2")
    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        states = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach().numpy()
        rows.append(states.mean(0) / np.linalg.norm(states.mean(0)))
    return np.stack(rows)


@cache  # nobody closes it, and the collector might take its socket before its client
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("model", ["letters", "all-minilm-l6-v2"])
@pytest.mark.parametrize("form", ["base64", "float"])  # openai asks for the first by default
def test_vectors_are_those_of_transformers(letters_url: str, expected: np.ndarray, model: str, form: Any) -> None:
    answer = client(letters_url).embeddings.create(model=model, input=TEXTS, encoding_format=form)
    raw = [each.embedding for each in answer.data]
    found = [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else np.array(v) for v in raw]
    assert np.abs(np.stack(found) - expected).max() < 1e-5
    assert [each.index for each in answer.data] == [0, 1, 2] and answer.model == model
    tokenizer = AutoTokenizer.from_pretrained(local_path("all-minilm-l6-v2"))
    assert answer.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    one = client(letters_url).embeddings.create(model=model, input=TEXTS[1], dimensions=expected.shape[1])
    assert np.abs(np.array(one.data[0].embedding) - expected[1]).max() < 1e-5


def ask(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": "letters", **body}, timeout=60)


def test_documents_come_back_by_their_worth(letters_url: str, expected: np.ndarray) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    body = ask(letters_url, "rerank", query=TEXTS[1], documents=documents, return_documents=True).json()
    similar = expected @ expected[1]
    order = np.argsort(-similar).tolist()
    assert [result["index"] for result in body["results"]] == order
    assert [result["relevance_score"] for result in body["results"]] == pytest.approx(similar[order], abs=1e-5)
    assert [result["document"]["text"] for result in body["results"]] == [TEXTS[i] for i in order]
    assert body["usage"]["total_tokens"] > 0
    assert len(ask(letters_url, "rerank", query="x", documents=documents, top_n=2).json()["results"]) == 2


@pytest.mark.parametrize(
    ("path", "param", "more"),
    [
        ("embeddings", "input", {"input": []}),
        ("embeddings", "input", {"input": ["a", " "]}),
        ("embeddings", "input.0", {"input": [[1, 2, 3]]}),
        ("embeddings", "input", {"input": ["a"] * 2049}),
        ("embeddings", "input", {"input": "cat " * 600}),
        ("embeddings", "input.1", {"input": ["a", "cat " * 600]}),
        ("embeddings", "dimensions", {"input": "a", "dimensions": 5}),
        ("embeddings", "encoding_format", {"input": "a", "encoding_format": "int8"}),
        ("embeddings", "model", {"input": "a", "model": "ada"}),
        ("rerank", "query", {"query": "", "documents": ["a"]}),
        ("rerank", "query", {"query": "cat " * 600, "documents": ["a"]}),
        ("rerank", "documents", {"query": "a", "documents": []}),
        ("rerank", "documents.1", {"query": "a", "documents": ["a", "cat " * 600]}),
        ("rerank", "top_n", {"query": "a", "documents": ["a"], "top_n": 0}),
    ],
)
def test_what_does_not_work_is_refused_by_name(letters_url: str, path: str, param: str, more: dict[str, Any]) -> None:
    answer = ask(letters_url, path, **more)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404 if param == "model" else 400, param)


@pytest.fixture(scope="module")
def poor_url(tiny_folder: Any) -> Iterator[str]:
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    access = {"api_keys": ["a", "b"], "tokens_per_minute": 400}
    with local_api({"served_model": "letters", "target": engine, "drafter": engine, "access": access}) as url:
        yield url


def test_tokens_are_paid_for(poor_url: str) -> None:
    def embed(key: str, *texts: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": "letters", "input": texts}
        return httpx.post(f"{poor_url}/v1/embeddings", json=body, headers=headers, timeout=60).status_code

    assert embed("none", "cat") == 401
    # A slow machine gets some tokens back in between: these take most of a minute.
    assert [embed("a", *["cat " * 180] * 2) for _ in range(2)] == [200, 429]
    assert [embed("b", "cat") for _ in range(3)] == [200, 200, 200]


class Counting:
    """A backend that says when it is asked, and how much at a time."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def embed(self, texts: list[str], salt: str, client: str) -> np.ndarray:
        self.asked.append(texts)
        await asyncio.sleep(0)
        return np.array([[float(text.strip("ab"))] for text in texts], np.float32)

    async def text_lengths(self, texts: list[str], client: str) -> TextLengths:
        return TextLengths([1] * len(texts), 1, None)


def test_many_texts_of_one_client_stand_before_no_other_client_s_one() -> None:
    backend = Counting()

    async def both() -> list[np.ndarray]:
        models = TextModels(backend, 8, str)  # type: ignore[arg-type]
        many = [f"{i}a" for i in range(200)]
        return await asyncio.gather(models.embed(many, "a"), models.embed(["7b"], "b"))

    many, one = asyncio.run(both())
    assert many[:, 0].tolist() == list(range(200)) and one.tolist() == [[7.0]]
    assert all(len(texts) <= 32 for texts in backend.asked)
    assert backend.asked.index(["7b"]) <= 1


def test_a_reranker_orders_where_there_is_one() -> None:

    class Embedder:
        max_tokens = 256

        def lengths(self, texts: Any) -> list[int]:
            return [len(text) for text in texts]

    retriever = Retriever(Embedder(), None, None, rerank=lambda query, texts: [float(len(t)) for t in texts])  # type: ignore[arg-type]
    assert retriever.rerank("q", ["a", "bbb"]) == [1.0, 3.0]
    assert retriever.lengths(["ab"]) == TextLengths([2], 256, 512)
