"""The README, and the documents that it leads to, say what the code does."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

from pydantic import BaseModel

from deployments.config import AppConfig, read_config

ROOT = Path(__file__).parents[1]


def test_every_configuration_field_is_explained() -> None:
    """A field that is added, or renamed, without a word in docs/configuration.md fails here."""
    document = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    tables = document.partition("\n## The configuration file")[2].partition("\n## ")[0]

    def names(value: object) -> set[str]:
        if isinstance(value, BaseModel):
            inner = {name: getattr(value, name) for name in type(value).model_fields}
        elif is_dataclass(value):
            inner = {field.name: getattr(value, field.name) for field in fields(value)}
        else:
            return set()
        leaves = {name for name, child in inner.items() if not names(child)}
        return leaves.union(*(names(child) for child in inner.values()))

    missing = {name for name in names(AppConfig()) if f"{name}`" not in tables}
    assert not missing


def test_the_shipped_configuration_is_valid() -> None:
    config = read_config(ROOT / "serve_config.yaml")
    assert config.retriever.options.chunk_tokens == 256
