"""The routes that answer with the retriever's own models: vectors of texts, and documents by their worth."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request

from deployments.config import AppConfig
from deployments.http.errors import read
from deployments.http.openapi import describe_body
from deployments.http.rate_limits import charge_of, client_of
from deployments.schemas.embeddings import Embeddings, EmbeddingsRequest, Ranking, RerankRequest, TextUsage
from rapid.errors import InvalidRequest, ModelNotFound, RapidError

if TYPE_CHECKING:
    from deployments.service import Service


def add_embedding_routes(app: FastAPI, config: AppConfig, service: Service) -> None:
    """`/v1/embeddings` and `/v1/rerank`. The embedder goes by its own name and by that of the served model."""
    retriever = config.retriever
    own = [Path(name).name for name in (retriever.embedder, retriever.reranker) if name]
    names = {config.model_name, retriever.embedder, retriever.reranker, *own}

    def check_model(asked: str) -> None:
        if asked not in names:
            raise ModelNotFound(f"the model {asked!r} is not served here; {own[0]!r} is", param="model")

    @asynccontextmanager
    async def paid(request: Request, texts: list[str], param: str, query: str = "") -> AsyncIterator[TextUsage]:
        """What it costs to read ``texts``, each with ``query``: reserved, and returned if there is no place."""
        charge = charge_of(request)
        found = await service.text_lengths([*texts, *([query] if query else [])], charge.client.tenant)
        lengths, more, most = found.lengths, 0, found.most
        if query:
            more = lengths.pop()
            if more > most:
                raise _too_long("query", more, most)
            most = most if found.most_with_query is None else found.most_with_query - more
        for i, length in enumerate(lengths):
            if length > most:
                raise _too_long(f"{param}.{i}" if len(texts) > 1 else param, length, most)
        cost = sum(lengths) + more * (len(texts) if found.most_with_query else 1)
        charge.reserve(cost)
        try:
            yield TextUsage(prompt_tokens=cost, total_tokens=cost)
        except RapidError as error:
            if error.status in (429, 503):
                charge.settle(0)
            raise

    @app.post("/v1/embeddings", **describe_body(EmbeddingsRequest, answer=Embeddings))
    async def embeddings(request: Request) -> Embeddings:
        body = await read(EmbeddingsRequest, request)
        check_model(body.model)
        async with paid(request, body.texts, "input") as usage:
            vectors = await service.embed(body.texts, client_of(request).tenant)
            if body.dimensions not in (None, vectors.shape[1]):
                raise InvalidRequest(f"dimensions: this model has {vectors.shape[1]}", param="dimensions")
        data = [
            {"object": "embedding", "index": i, "embedding": body.shown(vector)} for i, vector in enumerate(vectors)
        ]
        return Embeddings(data=data, model=body.model, usage=usage)

    @app.post("/v1/rerank", **describe_body(RerankRequest, answer=Ranking))
    async def rerank(request: Request) -> Ranking:
        body = await read(RerankRequest, request)
        check_model(body.model)
        async with paid(request, body.texts, "documents", query=body.query) as usage:
            scores = await service.rerank(body.query, body.texts, client_of(request).tenant)
        results = [
            {"index": i, "relevance_score": scores[i]}
            | ({"document": {"text": body.texts[i]}} if body.return_documents else {})
            for i in _best(scores, body.top_n)
        ]
        return Ranking(id=f"rerank-{uuid.uuid4().hex}", model=body.model, results=results, usage=usage)


def _too_long(where: str, length: int, most: int) -> InvalidRequest:
    message = f"{where}: at least {length} tokens, and {max(0, most)} are read here: send it in pieces"
    return InvalidRequest(message, code="context_length_exceeded", param=where)


def _best(scores: Sequence[float], most: int | None) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:most]
