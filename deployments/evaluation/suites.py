"""The paper's tables and ablations by name. Each is a function of the models: at the paper's size, or small.

The small form is for the embedded models: contexts of a few thousand tokens, short answers, and fewer questions of rows
whose output is the target's own in any case. A target that is a copy of the drafter with fewer bits stands in for the
smaller model of a family, so that a drafter that knows better is really there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from deployments.config import AppConfig
from deployments.evaluation.config import HERE, LC, Row
from deployments.evaluation.task import EvaluationError
from rapid.weights import embedded_models

Fields = dict[str, Any]
UPWARD = "upward"
_WEAK_BITS = 4
_SMALL_RETRIEVAL = 512  # tokens, of contexts that are a twentieth of the paper's
# In the small form: questions of each task for a row whose quality is LC's anyway or whose answers are dear, and for
# the rows of the second target, which reads everything once more.
_FEW, _MANY = 3, 30
_SAMPLED = (0.0, 0.3)
# With a temperature of its own a transfer is the same at every position, and at temperature 0 there is one at all.
_TRANSFER: Fields = {"strategy": "rapid", "transfer_temperature": 1.0}
_ALWAYS: Fields = {"threshold": -1.0}  # where retrieval is what is looked at, no question goes without passages
_SELF, _ETA_UP = 10.0, 40.0  # η as in the paper


class _Models(NamedTuple):
    """``is_small``: the embedded models. ``upward`` are target and a drafter that knows better; None: there is none."""

    is_small: bool
    own: Fields
    upward: Fields | None


def suite_of(name: str, args: AppConfig) -> Fields:
    """The fields of the evaluation ``name`` with the models of ``args``.

    Raises:
        EvaluationError: there is no such suite.
    """
    if name not in SUITES:
        raise EvaluationError(f"suite {name!r}: there is none of this name; there are {', '.join(SUITES)}")
    return SUITES[name](_models(args))


def _models(args: AppConfig) -> _Models:
    if embedded_models.is_embedded(args.target.model):
        options = replace(args.retriever.options, min_tokens=_SMALL_RETRIEVAL)
        args = args.model_copy(update={"retriever": args.retriever.model_copy(update={"options": options})})
        whole = args.model_copy(update={"drafter": args.target})
        return _Models(True, {"args": args}, {"args": whole, "target_bits": _WEAK_BITS})
    if args.drafting_engine.model == args.target.model:
        return _Models(False, {"args": args}, None)
    said = {name: getattr(args, name) for name in args.model_fields_set - {"drafter"}}
    return _Models(False, {"args": AppConfig(**said | {"colocated": True})}, {"args": args})


def _row(name: str, strategy: str | None = None, **more: Any) -> Fields:
    """A row; what of ``more`` is no field of `Row` goes into its `rapid` object."""
    own = {key: more.pop(key) for key in [*more] if key in Row.model_fields}
    return {"name": name, **own, "rapid": ({"strategy": strategy} if strategy else {}) | more}


def _paper_main(models: _Models) -> Fields:
    few: Fields = {"limit": _FEW} if models.is_small else {}
    exact: Fields = few | {"note": "exact: its output is distributed as LC's"} if models.is_small else few
    rows = [
        _row(LC, "autoregressive"),
        _row("RAG", "rag"),
        _row("SD", "speculative", **exact),
        _row("MagicDec", "magicdec", **exact),
        _row("TriForce", "triforce", **exact),
        _row("REST", "rest", **exact),
        _row("Speculative RAG", "speculative_rag", **few),
        _row("RAPID", **_TRANSFER, transfer_strength=_SELF),
        _row("RAPID, η auto", **_TRANSFER, transfer_strength="auto", **few),
        _row(
            "RAPID, whole document",
            **_TRANSFER,
            transfer_strength=_SELF,
            retrieve_from="whole",
            note="its passages come from the whole document, of which the target reads a part",
            **few,
        ),
    ]
    systems = {HERE: models.own}
    if models.upward:
        systems[UPWARD] = models.upward
        which = f"the target's weights are rounded to {_WEAK_BITS} bits a row, the drafter's are whole"
        note = {"note": which} if models.is_small else {}
        most: Fields = {"limit": _MANY} if models.is_small else {}
        up: Fields = {"system": UPWARD, "baseline": f"{LC} upward"}
        rows += [
            _row(f"{LC} upward", "autoregressive", system=UPWARD, **note, **most),
            _row("RAG of the drafter", "rag", rag_model="drafter", **up, **few),
            _row("RAPID upward", **_TRANSFER, transfer_strength=_ETA_UP, **up, **note, **most),
        ]
    tasks = _main_tasks(models.is_small)
    return _unread(models, 2) | {"systems": systems, "rows": rows, "temperatures": _SAMPLED, "tasks": tasks}


def _unread(models: _Models, number: int) -> Fields:
    """How many questions every row reads for itself: in the small form only where reading is what is looked at."""
    return {"unread": number} if models.is_small else {}


def _main_tasks(is_small: bool) -> list[Fields]:
    if not is_small:
        books = [{"name": f"infinitebench_{kind}", "context_tokens": 127_000} for kind in ("qa", "mc", "sum")]
        return [*books, *({"name": name} for name in ("longbench_v2", "longbench_v2_cot"))]
    return [
        {"name": "nq:depth=shared", "as_name": "nq", "limit": 200, "context_tokens": 6000, "max_tokens": 16},
        {"name": "qmsum:keep=evidence", "as_name": "qmsum", "limit": 60, "context_tokens": 2000, "max_tokens": 32},
        {"name": "loogle_short:keep=evidence", "as_name": "loogle", "limit": 60, "context_tokens": 2000,
         "max_tokens": 24},
        {"name": "xquad_en", "limit": 100, "context_tokens": 3000, "max_tokens": 12},
        {"name": "xquad_zh", "limit": 100, "context_tokens": 3000, "max_tokens": 16},
        *({"name": f"ruler_{kind}", "limit": 4, "context_tokens": 2000, "max_tokens": 32} for kind in _RULER),
    ]  # fmt: skip


_RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def _document_task(models: _Models, context_tokens: int | None = None, **more: Any) -> Fields:
    """The questions of an ablation: about shared documents of Wikipedia, or ∞Bench's books."""
    if not models.is_small:
        return {"name": "infinitebench_qa", "context_tokens": context_tokens or 127_000, **more}
    size = {"context_tokens": context_tokens or 6000, "limit": 60, "max_tokens": 20}
    return {"name": "nq:depth=shared", "as_name": "nq", **size, **more}


def _eta(models: _Models) -> Fields:
    rows = [_row(LC, "autoregressive"), _row("RAG", "rag")]
    etas = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0)
    for line, source in (("related", "read"), ("unrelated", "unrelated")):
        for eta in etas:
            how = _TRANSFER | {"transfer_strength": eta, "retrieval": _ALWAYS}
            rows.append(_row(f"η = {eta:g}, {line}", **how, retrieve_from=source, line=line, at=eta))
        how = _TRANSFER | {"transfer_strength": "auto", "retrieval": _ALWAYS}
        rows.append(_row(f"η auto, {line}", **how, retrieve_from=source))
    return _unread(models, 0) | {
        "systems": {HERE: models.own},
        "rows": rows,
        "temperatures": _SAMPLED,
        "axis": "η",
        "tasks": [_document_task(models)],
    }


def _context_length(models: _Models) -> Fields:
    lengths = (1000, 2000, 4000, 6000, 7000) if models.is_small else (8_000, 16_000, 32_000, 64_000, 127_000)
    return _unread(models, len(lengths)) | {
        "systems": {HERE: models.own},
        "rows": [
            _row(LC, "autoregressive"),
            _row("RAG", "rag"),
            _row("SD", "speculative"),
            _row("RAPID", **_TRANSFER, transfer_strength=_SELF),
        ],
        "axis": "tokens of context",
        "tasks": [
            _document_task(models, length, as_name=f"{length // 1000}K of context", at=length) for length in lengths
        ],
    }


def _retrieval_length(models: _Models) -> Fields:
    rows = [_row(LC, "autoregressive")]
    lengths = (256, 512, 1024, 2048) if models.is_small else (2048, 4096, 8192, 16_384)
    for length in lengths:
        kept = {"retrieval": {"max_tokens": length} | _ALWAYS}
        rows.append(_row(f"RAG of {length}", "rag", **kept, line="RAG", at=length))
        how = _TRANSFER | {"transfer_strength": _SELF} | kept
        rows.append(_row(f"RAPID of {length}", **how, line="RAPID", at=length))
    return _unread(models, 1) | {
        "systems": {HERE: models.own},
        "rows": rows,
        "axis": "tokens retrieved",
        "tasks": [_document_task(models)],
    }


def _retrieval_method(models: _Models) -> Fields:
    rows = [_row(LC, "autoregressive")]
    for method in ("dense", "sparse", "hybrid"):
        kept = {"retrieval": {"method": method} | _ALWAYS}
        rows.append(_row(f"RAG, {method}", "rag", **kept))
        rows.append(_row(f"RAPID, {method}", **_TRANSFER | {"transfer_strength": _SELF} | kept))
    return _unread(models, 1) | {"systems": {HERE: models.own}, "rows": rows, "tasks": [_document_task(models)]}


def _dialogue(models: _Models) -> Fields:
    size = {"context_tokens": 6000, "limit": 30, "max_tokens": 96} if models.is_small else {"context_tokens": 122_000}
    turns = 2 if models.is_small else 5
    return _unread(models, 1) | {
        "systems": {HERE: models.own},
        "rows": [
            _row(LC, "autoregressive"),
            _row("RAG", "rag"),
            _row("SD", "speculative"),
            _row("MagicDec", "magicdec"),
            _row("Lookup", "lookup"),
            _row("RAPID", **_TRANSFER, transfer_strength=_SELF),
        ],
        "temperatures": _SAMPLED,
        "tasks": [{"name": f"mtbench101:turns={turns}", "as_name": "mtbench101", **size}],
    }


SUITES: dict[str, Callable[[_Models], Fields]] = {
    "paper-main": _paper_main,
    "eta": _eta,
    "context-length": _context_length,
    "retrieval-length": _retrieval_length,
    "retrieval-method": _retrieval_method,
    "dialogue": _dialogue,
}
