"""The `rapid` object of a request: what it may say about retrieval and speculation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from deployments.schemas.body import Body
from rapid.strategies import STRATEGIES, VERIFICATION_RULES
from retrieval import Method


def _listed(summaries: Mapping[str, str]) -> str:
    return "; ".join(f"`{name}`: {summary}" for name, summary in summaries.items())


class RetrievalFields(Body):
    """`rapid.retrieval`: overrides of the configured retrieval options."""

    method: Method | None = None
    max_tokens: int | None = Field(None, ge=16, description="no chunk is longer")
    threshold: float | None = Field(None, ge=-1, le=1)
    chunk_tokens: int | None = Field(None, ge=16, description="each is embedded: small ones cost as much as large ones")
    rerank_candidates: int | None = Field(None, ge=1, le=256)
    keep: bool | None = None


class RapidFields(Body):
    """The `rapid` object of a request: overrides of the configured speculation."""

    strategy: str | None = Field(None, description=_listed({s.name: s.summary for s in STRATEGIES.values()}))
    num_draft_tokens: int | Literal["auto"] | None = None
    transfer_strength: float | Literal["auto"] | None = None
    transfer_temperature: float | None = Field(None, description="of p and q, at every position; 0: the paper's")
    transfer_divergence: float | None = Field(None, description="with η auto: KL(p̂‖p) in nats, at most")
    verification: str | None = Field(None, description=_listed(VERIFICATION_RULES))
    draft_top_k: int | None = None
    refresh: Literal["off", "auto"] | None = Field(None, description="auto: retrieves anew while the answer is written")
    draft_vocabulary: int | Literal["auto", "full"] | None = None
    rag_model: str | None = None
    num_answers: int | None = None
    num_clusters: int | None = None
    draft_cache: str | None = None
    draft_cache_tokens: int | None = None
    query: str | None = None
    retrieval: RetrievalFields = RetrievalFields()
    trace: bool = Field(False, description="with each chunk of a stream, the round that wrote it")
