"""The bodies of `POST /v1/embeddings`, which is OpenAI's, and of `POST /v1/rerank`, which is Jina's and Cohere's."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from deployments.schemas import ignored
from deployments.schemas.body import MAX_NAME, AtMost, Body, wrong

MAX_TEXTS = 2048  # OpenAI's


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`."""

    ignores = ignored.EMBEDDINGS

    model: str = Field(max_length=MAX_NAME)
    input: str | Annotated[list[str], AtMost(MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="only the embedder's own number")
    user: str | None = None

    @model_validator(mode="after")
    def _some_text(self) -> EmbeddingsRequest:
        if not all(text.strip() for text in self.texts) or not self.texts:
            raise wrong("input", "must hold texts, none of them empty")
        return self

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input

    def shown(self, vector: NDArray[np.float32]) -> list[float] | str:
        """A vector as the client wants it."""
        if self.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return [float(number) for number in vector]


class RerankDocument(Body):
    text: str


class RerankRequest(Body):
    """`POST /v1/rerank`."""

    model: str = Field(max_length=MAX_NAME)
    query: str = Field(min_length=1)
    documents: Annotated[list[str | RerankDocument], AtMost(MAX_TEXTS)] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1, description="how many of the best come back; all by default")
    return_documents: bool = False

    @property
    def texts(self) -> list[str]:
        return [each if isinstance(each, str) else each.text for each in self.documents]


class TextUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer of `/v1/embeddings`: an object with `embedding` and `index` for each text, in order."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    model: str
    usage: TextUsage


class Ranking(BaseModel):
    """The answer of `/v1/rerank`: `index` and `relevance_score` of the best documents, the best first."""

    id: str
    model: str
    results: list[dict[str, Any]]
    usage: TextUsage
