"""What the tests of the application share: the embedded models, and one that is next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rapid.catalog import entries, local_path


@pytest.fixture(scope="session", autouse=True)
def embedded_models() -> None:
    """Pulled before anything is said about what a command prints."""
    for entry in entries():
        local_path(entry.name)


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_network: Callable[..., PreTrainedModel],
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
) -> Path:
    """A model of a few thousand weights that reads and writes letters, as files."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_network(12, layers=1, window=8192).save_pretrained(folder)
    letter_tokenizer(12).save_pretrained(folder)
    return folder
