"""The tasks by name. Each small file beside this one has one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployments.evaluation.task import EvaluationError, Task

# name -> what makes the task of its options, which are keyword arguments.
TASKS: Mapping[str, Callable[..., Task]] = {}


def make_task(spec: str) -> Task:
    """The task of a name, or of a name with options: "nq", "nq:depth=0.5,documents=20".

    Raises:
        EvaluationError: there is no such task, option or value.
    """
    name, _, options = spec.partition(":")
    if name not in TASKS:
        raise EvaluationError(f"task {name!r}: there is none of this name; there are {', '.join(TASKS)}")
    given = dict(option.split("=", 1) if "=" in option else (option, "") for option in options.split(",") if option)
    try:
        return TASKS[name](**given)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"task {spec!r}: {error}") from error
