"""The configuration: the `args` of the application in serve_config.yaml, typed and strict.

`rapid` and `retrieval` declare their own fields, with the defaults; this module declares the application's.
"""

# Without `from __future__ import annotations`: Ray Serve reads the builder's real argument type.

import logging
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from deployments.engine_config import EngineConfig, Strict
from rapid.errors import InvalidRequest, RapidError
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import LONG_CONTENT_TOKENS
from rapid.weights.embedded_models import cache_dir
from retrieval import RetrievalOptions
from retrieval.kept import KEPT_FOR_S, MAX_KEPT_MB

PUBLIC = "public"  # the tenant of every client where there are no keys
logger = logging.getLogger(__name__)


class ConfigError(RapidError):
    """The configuration file is unreadable or a value is wrong; the message names the field."""

    _code = "config_error"


class RetrieverConfig(Strict):
    """The embedder, the vector store, and the defaults of requests."""

    embedder: str = Field("all-minilm-l6-v2", description="embedded name, local folder, or Hugging Face hub id")
    reranker: str | None = Field(
        None, min_length=1, description="colbert with BGE-M3, or a cross-encoder's folder or hub id; none when not set"
    )
    device: str = Field("cpu", description="where the embedder and the reranker run")
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    qdrant_url: str | None = Field(None, description="a Qdrant server; in-process when not set")
    qdrant_api_key: SecretStr | None = Field(None, description="env:NAME or file:PATH; QDRANT_API_KEY when not set")
    max_kept_mb: float = Field(MAX_KEPT_MB, ge=0, description="what one key's requests may leave with retrieval.keep")
    kept_for_s: float = Field(KEPT_FOR_S, gt=0, description="how long that stays after its last use")
    long_content_tokens: int = Field(LONG_CONTENT_TOKENS, ge=1, description="a longer message is context")
    options: RetrievalOptions = RetrievalOptions()


class FilesConfig(Strict):
    """Uploaded files and their vectors."""

    folder: str | None = Field(None, description="$RAPID_FILES, else files/ in the models' cache, when not set")
    max_stored_mb: float = Field(1024, gt=0, description="what one key's files and their text may take; more is a 413")
    max_files: int = Field(1000, ge=1, description="of one key; more is a 413")
    max_upload_mb: float = Field(128, gt=0, description="of one file that comes in parts (/v1/uploads); more is a 413")
    expire_after_s: int | None = Field(None, ge=1, description="a file is deleted so long after its upload")
    read_timeout_s: float = Field(60, gt=0, description="for the text of one PDF or HTML file")
    keep_responses_hours: float = Field(24, ge=0, description="of /v1/responses that are stored; 0 stores none")
    max_responses_mb: float = Field(64, gt=0, description="what one key's stored responses may take; the oldest go")

    @property
    def path(self) -> Path:
        """The folder, as the environment of this process names it."""
        named = self.folder or os.environ.get("RAPID_FILES")
        return Path(named).expanduser() if named else cache_dir() / "files"


class DatastoreConfig(Strict):
    """Texts that answers draft from."""

    path: str | None = Field(None, description="made by `rapid datastore build`; all keys draft from it")
    files: bool = Field(False, description="draft from uploaded files, each key from its own")
    answer_tokens: int = Field(
        0, ge=0, description="draft from the latest answers, each key from its own: how many tokens are kept"
    )

    @property
    def is_used(self) -> bool:
        return bool(self.path or self.files or self.answer_tokens)


class AccessConfig(Strict):
    """API keys and limits. Without keys every client may ask, and limits hold for each client address."""

    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description="where valid keys are, env:NAME or file:PATH; with RAPID_API_KEYS (comma-separated), all",
    )
    requests_per_minute: int | None = Field(None, ge=1, description="of one key; more is a 429")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and completion of one key; likewise")
    wrong_keys_per_minute: int = Field(60, ge=1, description="of one address; more is a 429, and right keys still pass")
    refusals_per_minute: int = Field(
        60, ge=1, description="4xx answers to one of several keys, or to wrong keys of one address; more come 2 s later"
    )
    max_in_flight: int | None = Field(
        None,
        ge=1,
        description="choices (`n`) and other requests of one key at the same time, more wait; with several keys 3/4 of "
        "the places when not set",
    )
    batch_in_flight: int = Field(2, ge=1, description="requests of one key's batch that are answered at the same time")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="names that clients may know this server by, * is all; localhost without keys when not set"
    )
    max_json_mb: float = Field(4, gt=0, description="a larger body of JSON is a 413")
    max_body_mb: float = Field(68, gt=0, description="a larger upload is a 413; OpenAI's clients send parts of 64 MiB")
    request_timeout_s: float | None = Field(
        None, gt=0, description="for a whole request; 408 or 504, or an error event in a stream that has begun"
    )
    isolation: Literal["shared", "key"] = Field(
        "key", description="key: each key has its own cache and files; shared: equal texts are computed once for all"
    )
    cors_origins: tuple[str, ...] = Field((), description="web pages of other hosts that may ask; * is all")

    @property
    def keys(self) -> list[str]:
        """All valid keys, with those in the environment of this process.

        Raises:
            ConfigError: a file cannot be read, or a variable is not set.
        """
        named = [key for where in self.api_keys for key in read_secrets(where, "access.api_keys")]
        return named + _separated(os.environ.get("RAPID_API_KEYS", ""))

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
    datastore: DatastoreConfig = DatastoreConfig()
    access: AccessConfig = AccessConfig()
    speculation: SpeculationParams = SpeculationParams()
    sampling: SamplingParams = SamplingParams()
    default_max_tokens: int = Field(512, ge=1, description="when a request names no max_tokens")
    special_tokens_in_text: bool = Field(
        False, description="read special tokens that messages, tools, files and prompts have; else they are text"
    )
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _one_drafter(self) -> "AppConfig":
        if self.colocated and "drafter" in self.model_fields_set:
            raise ValueError("colocated means that the target drafts: leave `drafter` out, or set colocated to false")
        if self.target.replicas.min < 1:
            raise ValueError("target.replicas.min must be at least 1: without a target nothing can be answered")
        if self.speculation.strategy == "rest" and not self.datastore.is_used:
            raise ValueError("speculation.strategy rest needs datastore.path, .files or .answer_tokens")
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

    def salt_of(self, tenant: str) -> str:
        """What is cached for ``tenant`` is found by tenants with the same salt alone."""
        return "" if tenant == PUBLIC or self.access.isolation == "shared" else tenant

    @property
    def max_in_flight(self) -> int | None:
        """How many requests one client may have at the same time; None: any number."""
        if self.access.max_in_flight is not None or len(self.access.keys) < 2:
            return self.access.max_in_flight
        return max(1, 3 * self.target.max_sequences * self.target.replicas.max // 4)

    @property
    def max_admitted(self) -> int | None:
        """How many choices all clients may have under way at the same time; None: any number.

        Half as many as there are places wait for one in the engines' own queue: they are read meanwhile.
        """
        places = self.target.max_sequences * self.target.replicas.max
        return None if self.max_in_flight is None else places + (places + 1) // 2

    @property
    def model_name(self) -> str:
        return self.served_model or self.target.model


def read_secrets(where: SecretStr, field: str) -> list[str]:
    """The keys that ``where`` names: env:NAME (separated by commas), or file:PATH (one a line).

    Ray Serve keeps the configuration, logs it and shows it, so a key itself should not be there; it still counts.

    Raises:
        ConfigError: there is no such variable or file, or it is empty; the message names ``field``.
    """
    kind, _, place = where.get_secret_value().strip().partition(":")
    if kind == "env":
        found = _separated(os.environ.get(place, ""))
    elif kind == "file":
        try:
            found = [line.strip() for line in Path(place).expanduser().read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{field}: {place} cannot be read: {error}") from error
    else:
        logger.warning("%s: write env:NAME or file:PATH: Ray Serve logs and shows what stands in the file", field)
        return [where.get_secret_value().strip()]
    if not any(found):
        raise ConfigError(f"{field}: {'the variable' if kind == 'env' else 'the file'} {place} has no key")
    return [key for key in found if key]


def _separated(keys: str) -> list[str]:
    return [key.strip() for key in keys.split(",") if key.strip()]


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        ConfigError: the file cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error


def read_config(path: Path) -> AppConfig:
    """The application's configuration from a Ray Serve config file.

    Raises:
        ConfigError: the file is missing, is no YAML, or a field is unknown or wrong.
    """
    document = read_yaml(path)
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or not applications or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: must hold a list `applications` with one application")
    return parse_config(applications[0].get("args") or {}, source=f"{path}: applications[0].args")


def parse_config(args: dict[str, Any], *, source: str = "args") -> AppConfig:
    """Checks ``args``; the message of the ConfigError lists every field that is wrong."""
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError(f"{source}: {in_words(error)}") from error
    except InvalidRequest as error:
        raise ConfigError(f"{source}: {error.message}") from error


def in_words(error: ValidationError) -> str:
    """Every field that is wrong, and why."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {'unknown field' if each['type'] in unknown else each['msg']}"
        for each in error.errors()
    )
