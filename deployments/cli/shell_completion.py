"""What the shell offers on Tab: values of options and arguments. Nothing slow is imported for it."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rapid.strategies import STRATEGIES, VERIFICATION_RULES
from rapid.weights import embedded_models

CONFIG = Path("serve_config.yaml")


def one_of(names: Iterable[str]) -> str:
    """An option's help: "a, b or c."."""
    *others, last = names
    return f"{', '.join(others)} or {last}."


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
    return (entry.name for entry in embedded_models.entries() if kind in (None, entry.kind))


strategies = _offered(lambda _: iter(STRATEGIES))
auto = _offered(lambda _: iter(("auto",)))
rules = _offered(lambda _: iter(VERIFICATION_RULES))
configs = _offered(_folders_and_yaml)
model_names = _offered(lambda _: _model_names("llm"))
embedded = _offered(lambda _: _model_names(None))
