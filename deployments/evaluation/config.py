"""What an evaluation asks of whom: tasks × rows × temperatures. A row is a system and how it decodes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.config import AppConfig, ConfigError, in_words, read_yaml
from deployments.engine_config import Strict
from deployments.schemas.rapid_fields import RapidFields
from rapid.errors import InvalidRequest
from rapid.strategies import STRATEGIES

HERE = "here"
LC = "LC"  # long context: the target alone, with which all is compared


class System(Strict):
    """What answers: models in this process, or the server at ``url``.

    With ``target_bits`` the target is a copy of itself whose weights were rounded to so many bits, one scale a row:
    a drafter with the whole weights then knows more than its target.
    """

    url: str | None = Field(None, description="of a server that speaks OpenAI's API, with its /v1")
    model: str | None = Field(None, description="of that server; else the first that it names")
    args: AppConfig = Field(AppConfig(), description="models, retriever and datastore, as in a Serve config's `args`")
    target_bits: int | None = Field(None, ge=2, le=8)

    @model_validator(mode="after")
    def _one_place(self) -> System:
        if self.url and (self.target_bits or "args" in self.model_fields_set):
            raise ValueError("a server has its own models: leave out args and target_bits, or url")
        if self.model and not self.url:
            raise ValueError("model is a server's: give its url, or name args.target.model")
        return self


class Row(Strict):
    """One row of the tables. It is compared with the row ``baseline``, question by question.

    ``retrieve_from`` is what the passages are retrieved from: what the target reads; the whole document, where a
    benchmark's truncation leaves the target a part of it, and only such questions are asked; or another question's
    document. ``limit`` is how many questions of each task the row is asked.
    """

    name: str = Field(min_length=1)
    system: str = HERE
    rapid: RapidFields = RapidFields(strategy="autoregressive")
    retrieve_from: Literal["read", "whole", "unrelated"] = "read"
    baseline: str = LC
    limit: int | None = Field(None, ge=1)
    note: str = Field("", description="what a reader of the table must know of it")
    line: str | None = Field(None, description="in a plot over `at`, the line that it is a point of")
    at: float | None = None

    @field_validator("rapid")
    @classmethod
    def _names_a_strategy(cls, rapid: RapidFields) -> RapidFields:
        if rapid.strategy not in STRATEGIES:
            raise ValueError(f"rapid.strategy must be one of {', '.join(STRATEGIES)}, got {rapid.strategy!r}")
        if rapid.trace:
            raise ValueError("rapid.trace is asked for wherever it can be had: leave it out")
        return rapid

    @property
    def strategy(self) -> str:
        assert self.rapid.strategy is not None
        return self.rapid.strategy

    def options(self) -> dict[str, Any]:
        """The `rapid` object of its requests."""
        return self.rapid.model_dump(exclude_unset=True)


class TaskChoice(Strict):
    """A task by name, and what of it is asked; the evaluation's limits hold too.

    ``as_name`` tells variants of a task apart, which differ in ``context_tokens``.
    """

    name: str
    as_name: str | None = None
    limit: int | None = Field(None, ge=1)
    context_tokens: int | None = Field(None, ge=64)
    max_tokens: int | None = Field(None, ge=1, description="of an answer, where the benchmark allows more")
    data: Path | None = None
    at: float | None = Field(None, description="its place on the axis of a plot")

    @property
    def label(self) -> str:
        return self.as_name or self.name


class Evaluation(Strict):
    """One `rapid eval`."""

    tasks: tuple[TaskChoice, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    systems: dict[str, System] = Field(default_factory=lambda: {HERE: System()})
    temperatures: tuple[float, ...] = Field((0.0,), min_length=1)
    limit: int | None = Field(None, ge=1, description="the most questions of any task")
    context_tokens: int | None = Field(None, ge=64, description="the most tokens of any prompt")
    seed: int = 0
    data: Path | None = None
    from_hub: bool = False
    tokenizer: str | None = Field(None, description="whose tokens prompts are cut in; else the first target's")
    concurrency: int = Field(1, ge=1, le=64)
    axis: str | None = Field(None, description="what the places `at` of rows or tasks are: a plot has a line over them")
    judge_url: str | None = None
    judge_model: str | None = None
    unread: int = Field(
        3, ge=0, description="questions that each row reads as if for the first time, so that reading can be compared"
    )
    reported: int = Field(25, ge=0, description="questions of each task whose passages and documents the report shows")

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        for what, names in (("task", [t.label for t in self.tasks]), ("row", [r.name for r in self.rows])):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"two {what}s are called {twice.pop()}: give each a name of its own")
        for row in self.rows:
            if row.system not in self.systems:
                raise ValueError(f"row {row.name}: there is no system {row.system}")
        if any(not 0 <= temperature <= 2 for temperature in self.temperatures):
            raise ValueError("temperatures lie between 0 and 2")
        return self

    @property
    def cuts_with(self) -> str:
        """The model whose tokenizer truncates prompts."""
        local = [system.args for system in self.systems.values() if not system.url]
        return self.tokenizer or (local[0] if local else AppConfig()).target.model

    def baseline_of(self, row: Row) -> Row | None:
        """The row that ``row`` is compared with; None for a baseline itself."""
        return next((other for other in self.rows if other.name == row.baseline and other != row), None)

    def identity(self, row: Row, task: TaskChoice) -> str:
        """Names all that an answer depends on besides the question: answers with another one are of another run."""
        system = self.systems[row.system].model_dump(mode="json", exclude_defaults=True)
        said = row.model_dump(mode="json", exclude={"limit", "note", "baseline", "line", "at"}, exclude_defaults=True)
        asked = task.model_dump(mode="json", exclude={"limit", "data", "at"}) | {"all": self.context_tokens}
        return hashlib.sha256(json.dumps([system, said, asked, self.seed], sort_keys=True).encode()).hexdigest()[:12]


def read_evaluation(path: Path, **more: Any) -> Evaluation:
    """The evaluation that a YAML file describes; fields in ``more`` that are not None replace those of the file.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or wrong.
    """
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must be a mapping with `tasks` and `rows`")
    return parse_evaluation(fields | {k: v for k, v in more.items() if v is not None}, source=str(path))


def parse_evaluation(fields: dict[str, Any], *, source: str) -> Evaluation:
    """
    Raises:
        ConfigError: a field is unknown or wrong; the message names each.
    """
    try:
        return Evaluation.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{source}: {in_words(error)}") from error
    except InvalidRequest as error:
        raise ConfigError(f"{source}: {error.message}") from error
