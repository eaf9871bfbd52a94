"""The tasks by name. Each small file beside this one has one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from pydantic import ValidationError

from deployments.evaluation.task import EvaluationError, Task
from deployments.evaluation.tasks.infinitebench import BookChoice, BookQA, BookSummary
from deployments.evaluation.tasks.infinitebench_retrieval import Retrieval
from deployments.evaluation.tasks.longbench_v2 import LongBenchV2
from deployments.evaluation.tasks.loogle import LooGLE
from deployments.evaluation.tasks.mtbench101 import MTBench101
from deployments.evaluation.tasks.nq import NaturalQuestions
from deployments.evaluation.tasks.own import OwnQuestions
from deployments.evaluation.tasks.qmsum import QMSum
from deployments.evaluation.tasks.ruler import Needles
from deployments.evaluation.tasks.ruler_lists import CommonWords, FrequentWords, VariableTracking
from deployments.evaluation.tasks.ruler_qa import DocumentQA
from deployments.evaluation.tasks.xquad import XQuAD

# name -> what makes the task of its name and its options.
TASKS: Mapping[str, Callable[..., Task]] = {
    "longbench_v2": LongBenchV2,
    "longbench_v2_cot": partial(LongBenchV2, cot=True),
    "infinitebench_qa": BookQA,
    "infinitebench_mc": BookChoice,
    "infinitebench_sum": BookSummary,
    "infinitebench_passkey": partial(Retrieval, kind="passkey"),
    "infinitebench_number_string": partial(Retrieval, kind="number_string"),
    "infinitebench_kv_retrieval": partial(Retrieval, kind="kv_retrieval"),
    "mtbench101": MTBench101,
    "ruler_niah_single_1": partial(Needles, haystack="noise"),
    "ruler_niah_single_2": partial(Needles, haystack="essay"),
    "ruler_niah_single_3": partial(Needles, haystack="essay", value="uuids"),
    "ruler_niah_multikey_1": partial(Needles, haystack="essay", keys=4),
    "ruler_niah_multikey_2": partial(Needles, haystack="needles"),
    "ruler_niah_multikey_3": partial(Needles, haystack="needles", key="uuids", value="uuids"),
    "ruler_niah_multivalue": partial(Needles, haystack="essay", values=4),
    "ruler_niah_multiquery": partial(Needles, haystack="essay", keys=4, queries=4),
    "ruler_vt": VariableTracking,
    "ruler_cwe": CommonWords,
    "ruler_fwe": FrequentWords,
    "ruler_qa_1": partial(DocumentQA, dataset="squad"),
    "ruler_qa_2": partial(DocumentQA, dataset="hotpotqa"),
    "qmsum": QMSum,
    "loogle_short": partial(LooGLE, dependency="short"),
    "loogle_long": partial(LooGLE, dependency="long"),
    "xquad_en": partial(XQuAD, language="en"),
    "xquad_zh": partial(XQuAD, language="zh"),
    "nq": NaturalQuestions,
    "own": OwnQuestions,
}


def make_task(spec: str) -> Task:
    """The task of a name, or of a name with options: "nq", "nq:depth=0.5", "qmsum:keep=evidence,queries=all".

    Raises:
        EvaluationError: there is no such task, option or value.
    """
    name, _, listed = spec.partition(":")
    if name not in TASKS:
        raise EvaluationError(f"task {name!r}: there is none of this name; there are {', '.join(TASKS)}")
    options: dict[str, str] = {}
    for option in filter(None, listed.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise EvaluationError(f"task {spec!r}: an option is written NAME=VALUE; {option!r} is not")
        options[key] = value
    try:
        return TASKS[name](**{"name": spec, **options})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors())
        raise EvaluationError(f"task {spec!r}: {wrong}") from error
