"""What the shell offers on Tab: values of options and arguments. Nothing slow is imported for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rapid.weights import embedded_models as catalog

CONFIG = Path("serve_config.yaml")

# Their own modules load PyTorch, and whoever presses Tab does not wait for that; a test holds these to them.
STRATEGIES = ("autoregressive", "rag", "lookup", "speculative", "rapid")
RULES = ("published", "reference", "augmented", "lossless")


def _offered(values: Callable[[str], Iterator[str]]) -> dict[str, Any]:
    return {
        "autocompletion": lambda incomplete: [value for value in values(incomplete) if value.startswith(incomplete)]
    }


def _folders_and_yaml(incomplete: str) -> Iterator[str]:
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    for path in sorted(folder.glob("*")):
        if path.is_dir() and not path.name.startswith("."):
            yield f"{path}/"
        elif path.suffix in (".yaml", ".yml"):
            yield str(path)


def _model_names(kind: str | None) -> Iterator[str]:
    return (entry.name for entry in catalog.entries() if kind in (None, entry.kind))


strategies = _offered(lambda _: iter(STRATEGIES))
rules = _offered(lambda _: iter(RULES))
configs = _offered(_folders_and_yaml)
model_names = _offered(lambda _: _model_names("llm"))
embedded = _offered(lambda _: _model_names(None))
