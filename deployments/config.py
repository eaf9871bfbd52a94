"""The configuration: the `args` of the application in serve_config.yaml, typed and strict.

`rapid` and `retrieval` declare their own fields, with the defaults; this module declares the application's.
"""

# Without `from __future__ import annotations`: Ray Serve reads the builder's real argument type.

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from rapid.errors import InvalidRequest, RapidError
from rapid.kv_cache.memory import FREE_MEMORY_SHARE
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import LONG_CONTENT_TOKENS
from rapid.weights.embedded_models import cache_dir
from retrieval import RetrievalOptions


class ConfigError(RapidError):
    """The configuration file is unreadable or a value is wrong; the message names the field."""

    _code = "config_error"


class Strict(BaseModel):
    """No unknown fields: a typo is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicasConfig(Strict):
    """How many replicas there are. Between the bounds they follow the open leases and the KV memory in use."""

    min: int = Field(1, ge=0, description="0 lets a drafter go away while no request needs it")
    max: int = Field(1, ge=1)
    target_leases: float | None = Field(
        None, gt=0, description="open leases a replica is meant to have; three quarters of max_sequences when not set"
    )
    target_kv_share: float = Field(0.8, gt=0, le=1, description="share of its KV memory a replica is meant to use")
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> "ReplicasConfig":
        if self.max < max(1, self.min):
            raise ValueError(f"max must be at least min, got min {self.min} and max {self.max}")
        return self


class EngineConfig(Strict):
    """One model and the actors that run it."""

    model: str = Field("smollm2-135m-instruct", description="embedded name, local folder, or Hugging Face hub id")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    device_map: Literal["auto"] | None = Field(
        None, description="auto spreads the layers over the num_gpus whole GPUs of one process"
    )
    num_cpus: float = Field(0.5, gt=0, description="what Ray reserves for the engine; not a limit on threads")
    num_gpus: float = Field(0, ge=0)
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that share the model; num_cpus and num_gpus are each rank's"
    )
    replicas: ReplicasConfig = ReplicasConfig()
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward pass; all cores when not set")
    quantization: str = Field(
        "none", pattern="^(none|int8|fp8|int4)$", description="of the weights: int8, int4 on a CPU; also fp8 on CUDA"
    )
    kv_memory_gib: float | None = Field(
        None, gt=0, description=f"for keys and values; {FREE_MEMORY_SHARE:.0%} of what is free when not set"
    )
    max_batch_tokens: int = Field(128, ge=1, description="tokens in one forward pass; a long prefill is cut to this")
    max_sequences: int = Field(8, ge=1, description="requests that a replica holds at the same time")
    max_queued: int = Field(64, ge=1, description="requests that wait for a place; one more is answered 429")
    pass_timeout_s: float = Field(
        20, gt=0, description="a forward pass that takes longer, and far longer than others, ends the engine's process"
    )
    idle_timeout_s: float = Field(600, gt=0, description="a sequence unused for this long is freed")
    drain_timeout_s: float = Field(600, gt=0, description="how long a replica that is to go waits for its leases")

    @model_validator(mode="after")
    def _one_way_to_share(self) -> "EngineConfig":
        if self.device_map is None:
            return self
        if self.tensor_parallel > 1:
            raise ValueError("device_map is for one process and tensor_parallel for several: set one of them")
        if self.device != "auto":
            raise ValueError(f"device_map chooses the devices: leave device at auto, got {self.device}")
        if self.num_gpus % 1:
            raise ValueError(f"with device_map num_gpus is a number of whole GPUs, got {self.num_gpus:g}")
        return self

    @property
    def num_stages(self) -> int:
        """How many devices a pass goes through, one after another."""
        return max(1, int(self.num_gpus)) if self.device_map else 1


class RetrieverConfig(Strict):
    """The embedder, the vector store, and the defaults of requests."""

    embedder: str = Field("all-minilm-l6-v2", description="embedded name, local folder, or Hugging Face hub id")
    device: str = "cpu"
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    qdrant_url: str | None = Field(None, description="a Qdrant server; in-process when not set")
    qdrant_api_key: SecretStr | None = Field(None, description="QDRANT_API_KEY in the environment when not set")
    long_content_tokens: int = Field(LONG_CONTENT_TOKENS, ge=1, description="a longer message is context")
    options: RetrievalOptions = RetrievalOptions()


class FilesConfig(Strict):
    """Uploaded files and their vectors."""

    folder: str | None = Field(None, description="$RAPID_FILES, else files/ in the models' cache, when not set")
    max_stored_mb: float = Field(1024, gt=0, description="what one key's files may take together; more is a 413")
    read_timeout_s: float = Field(60, gt=0, description="for the text of one PDF or HTML file")

    @property
    def path(self) -> Path:
        """The folder, as the environment of this process names it."""
        named = self.folder or os.environ.get("RAPID_FILES")
        return Path(named).expanduser() if named else cache_dir() / "files"


class AccessConfig(Strict):
    """API keys and limits. Without keys every client may ask, and limits hold for each client address."""

    api_keys: tuple[SecretStr, ...] = Field((), description="with RAPID_API_KEYS (comma-separated), all valid keys")
    requests_per_minute: int | None = Field(None, ge=1, description="of one key; more is a 429")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and completion of one key; likewise")
    max_body_mb: float = Field(64, gt=0, description="a larger request is a 413")
    request_timeout_s: float | None = Field(
        None, gt=0, description="for a whole request; 408 or 504, or an error event in a stream that has begun"
    )
    cors_origins: tuple[str, ...] = Field((), description="web pages of other hosts that may ask; * is all")

    @property
    def keys(self) -> list[str]:
        """All valid keys, with those in the environment of this process."""
        named = [key.get_secret_value() for key in self.api_keys] + os.environ.get("RAPID_API_KEYS", "").split(",")
        return [key.strip() for key in named if key.strip()]

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(key.get_secret_value().strip() for key in keys):
            raise ValueError("a key is empty")
        return keys


class ObservabilityConfig(Strict):
    """What the log says about requests besides numbers."""

    log_prompts: bool = Field(False, description="write prompts and answers into the log's line of each request, too")


class AppConfig(Strict):
    """The whole configuration of a running application."""

    served_model: str | None = Field(None, description="the model's name over HTTP; target.model when not set")
    target: EngineConfig = EngineConfig()
    drafter: EngineConfig = EngineConfig()
    overlap: bool | Literal["auto"] = Field(
        "auto", description="draft on while the target verifies; auto: where each has whole GPUs of its own"
    )
    colocated: bool = Field(
        False, description="the target's engine also drafts, with the same weights; no drafter then"
    )
    retriever: RetrieverConfig = RetrieverConfig()
    files: FilesConfig = FilesConfig()
    access: AccessConfig = AccessConfig()
    speculation: SpeculationParams = SpeculationParams()
    sampling: SamplingParams = SamplingParams()
    default_max_tokens: int = Field(512, ge=1, description="when a request names no max_tokens")
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _one_drafter(self) -> "AppConfig":
        if self.colocated and "drafter" in self.model_fields_set:
            raise ValueError("colocated means that the target drafts: leave `drafter` out, or set colocated to false")
        if self.target.replicas.min < 1:
            raise ValueError("target.replicas.min must be at least 1: without a target nothing can be answered")
        return self

    @property
    def drafting_engine(self) -> EngineConfig:
        """The engine that drafts: the target's own where the two are colocated."""
        return self.target if self.colocated else self.drafter

    @property
    def overlaps(self) -> bool:
        """Whether drafters draft on while the target verifies."""
        if self.overlap != "auto":
            return self.overlap
        return not self.colocated and self.target.num_gpus >= 1 and self.drafter.num_gpus >= 1

    @property
    def model_name(self) -> str:
        return self.served_model or self.target.model


def read_config(path: Path) -> AppConfig:
    """The application's configuration from a Ray Serve config file.

    Raises:
        ConfigError: the file is missing, is no YAML, or a field is unknown or wrong.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or not applications or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: must hold a list `applications` with one application")
    return parse_config(applications[0].get("args") or {}, source=f"{path}: applications[0].args")


def parse_config(args: dict[str, Any], *, source: str = "args") -> AppConfig:
    """Checks ``args``; the message of the ConfigError lists every field that is wrong."""
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in e['loc'])}: {_in_words(e['type'], e['msg'])}" for e in error.errors()
        )
        raise ConfigError(f"{source}: {wrong}") from error
    except InvalidRequest as error:
        raise ConfigError(f"{source}: {error.message}") from error


def _in_words(kind: str, message: str) -> str:
    return "unknown field" if kind in ("extra_forbidden", "unexpected_keyword_argument") else message
