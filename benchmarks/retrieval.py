"""What each retrieval method finds of the passages that answer real questions, and what retrieving costs.

`quality`: for every question, the share of its gold text within the kept chunks, and whether any of it is kept. The
constants of `retrieval` (neighbours, RRF's k, prefixes) were chosen by every second document, `chosen_on`; `held_out`
are the others, whose figures were in sight meanwhile. Each question is also asked of a text that does not answer it:
from the same half the calibration of the embedder is learned, and the other half says how well it holds. `cost`:
seconds and memory for a long file, in turns with an earlier checkout.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.checkouts import HERE, Checkout
from benchmarks.common.passages import Asked, Document, documents
from benchmarks.common.results import FOLDER, write
from deployments.builders import build_retriever
from deployments.config import FilesConfig, RetrieverConfig
from retrieval import METHODS, Retrieval, RetrievalOptions, Retriever
from retrieval.calibration import MEASURED, UNCALIBRATED, KnownPassage, calibrate, observe

MODEL = "smollm2-135m-instruct"
OPTIONS = RetrievalOptions(chunk_tokens=256, keep=True)
BEFORE = "dense, threshold 0.3"
WAYS = {BEFORE: replace(OPTIONS, method="dense", threshold=0.3)} | {
    method: replace(OPTIONS, method=method) for method in METHODS
}
FOUND = ("gold_text", "any_gold", "all_gold", "nothing_retrieved", "below_threshold")
XQUAD_EVERY = 8  # of its 1,190 questions in each language
CALIBRATION_QUESTIONS = 40  # of a document
FILE_TOKENS = 120_000
# Runs in both checkouts.
WORKER = """
import json, resource, sys, time
from benchmarks.files import texts
from deployments.builders import build_retriever
from deployments.config import FilesConfig, RetrieverConfig
from retrieval import RetrievalOptions

[book, _] = texts(int(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    retriever = build_retriever(RetrieverConfig(), FilesConfig(folder="/nonexistent"), "smollm2-135m-instruct")
    retriever.retrieve(["A whale. " * 600], "warm", RetrievalOptions(chunk_tokens=256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = []
    for query in ("Why does the narrator go to sea?", "Who is the captain of the ship?"):
        started = time.perf_counter()
        found = retriever.retrieve([book], query, RetrievalOptions(chunk_tokens=256))
        spent.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"first_s": spent[0], "again_s": spent[1], "peak_mib": peak / 1024, "grown_mib": (peak - before) / 1024}
    print(json.dumps(row | {"chunks": found.num_chunks}), flush=True)
"""


def found(asked: Asked, retrieval: Retrieval, is_gated: bool) -> dict[str, float]:
    """The share of the gold text that is kept, whether any of it is, and whether all is.

    ``below_threshold``: the drafters do not use what was found. If ``is_gated`` that counts as nothing found.
    """
    below = not retrieval.reaches_threshold
    chunks = () if is_gated and below else retrieval.chunks
    wanted = sum(end - start for start, end in asked.gold)
    got = sum(max(0, min(end, chunk.end) - max(start, chunk.start)) for start, end in asked.gold for chunk in chunks)
    return {
        "gold_text": got / wanted,
        "any_gold": got > 0,
        "all_gold": got >= wanted,
        "nothing_retrieved": not chunks,
        "below_threshold": below,
    }


def quality(retriever: Retriever, some: Sequence[Document]) -> list[dict[str, Any]]:
    """A row for each question and way; ``half`` 0 is the one that constants were chosen on."""
    rows = []
    for number, document in enumerate(some):
        chunks, tokens = retriever.chunks([document.text], OPTIONS)
        every = XQUAD_EVERY if document.source.startswith("xquad") else 1
        for asked in document.questions[::every]:
            for way, options in WAYS.items():
                retrieval = retriever.retrieve_from(chunks, tokens, asked.question, options)
                rows.append(
                    {"source": document.source, "half": number % 2, "way": way} | found(asked, retrieval, way == BEFORE)
                )
        print(f"{document.source} {number}: {tokens:,} tokens, {len(chunks)} chunks", flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means by source, half and way, and two counts."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["source"], "all", row["way"]].append(row)
        if not row["source"].startswith("xquad"):
            groups[row["source"], ("chosen_on", "held_out")[row["half"]], row["way"]].append(row)
    results: dict[str, Any] = {}
    for (source, half, way), members in groups.items():
        summed = {name: sum(m[name] for m in members) for name in FOUND}
        means = {
            name: round(total / len(members), 4) for name, total in summed.items() if name.endswith(("text", "gold"))
        }
        counts = {name: total for name, total in summed.items() if name not in means}
        results.setdefault(source, {}).setdefault(half, {})[way] = means | counts | {"questions": len(members)}
    return results


def known(some: Sequence[Document]) -> list[KnownPassage]:
    return [
        KnownPassage(asked.question, document.text, max(asked.gold, key=lambda span: span[1] - span[0]))
        for document in some
        for asked in document.questions[:: max(1, len(document.questions) // CALIBRATION_QUESTIONS)]
    ]


def calibration(retriever: Retriever, some: Sequence[Document]) -> dict[str, Any]:
    """Learned from one half of the documents, and how well that holds in the other one. English alone."""
    english = [document for document in some if document.source != "xquad_zh"]
    learned = calibrate(observe(retriever, known(english[::2]), OPTIONS))
    held_out = observe(retriever, known(english[1::2]), OPTIONS)
    confidence = np.array([learned.by_cosine.of(each.cosines) for each in held_out])
    own, right = (np.array([getattr(each, name) for each in held_out]) for name in ("is_own", "is_found"))
    bins = []
    for i in range(5):
        inside = np.minimum(confidence * 5, 4).astype(int) == i
        if inside.any():
            bins.append(
                {
                    "confidence": round(float(confidence[inside].mean()), 3),
                    "found": round(float(right[inside].mean()), 3),
                    "searches": int(inside.sum()),
                }
            )
    reach = np.array([max(each.cosines) >= learned.threshold for each in held_out])

    def means(which: Any) -> dict[str, float]:
        return {
            "confidence": round(float(confidence[which].mean()), 3),
            "reach_threshold": round(float(reach[which].mean()), 3),
        }

    other_half = {"own_text": means(own), "another_text": means(~own), "bins": bins}
    return {"learned": learned.as_json(), "other_half": other_half}


def cost(before: Path, repeats: int) -> dict[str, Any]:
    """Medians of runs that take turns, each in a new process for each side."""
    rows: dict[str, list[dict[str, float]]] = {"now": [], "before": []}
    for _ in range(repeats):
        for side, source in (("before", before), ("now", HERE)):
            worker = Checkout(source, WORKER, FILE_TOKENS)
            rows[side].append(worker.ask())
            worker.end()
    names = rows["now"][0]
    medians = {
        side: {name: round(statistics.median(row[name] for row in some), 2) for name in names}
        for side, some in rows.items()
    }
    return medians | {"ratio_first": round(medians["now"]["first_s"] / medians["before"]["first_s"], 3), "runs": rows}


def plot(results: dict[str, Any]) -> None:
    """The gold that each way finds: benchmarks/results/retrieval.svg."""
    from matplotlib import pyplot

    sources = {"qmsum": "QMSum, gold text", "loogle": "LooGLE", "xquad_en": "XQuAD en", "xquad_zh": "XQuAD zh"}
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for i, way in enumerate(WAYS):
        shares = [100 * results[source]["all"][way]["gold_text"] for source in sources]
        bars = axes.bar([x + 0.2 * (i - 1.5) for x in range(len(sources))], shares, 0.19, label=way)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(sources)), list(sources.values()))
    axes.set_ylabel("% of the gold within the kept chunks")
    axes.set_ylim(0, 112)
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FOLDER / "retrieval.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("quality", "calibration", "cost"), help="else quality and calibration")
    parser.add_argument("--vectors", type=Path, help="keep the documents' vectors in this folder for the next run")
    parser.add_argument("--before", type=Path, help="cost: an earlier checkout")
    parser.add_argument("--repeats", type=int, default=1, help="cost: runs of each checkout")
    options = parser.parse_args()
    if options.part == "cost":
        if options.before is None:
            raise SystemExit("--part cost needs --before, an earlier checkout")
        write("retrieval", cost(options.before.absolute(), options.repeats), part="cost")
        return
    files = FilesConfig(folder=str(options.vectors)) if options.vectors else None
    retriever = build_retriever(RetrieverConfig(), files, MODEL)
    some = list(documents())
    if options.part != "calibration":
        results = summary(quality(retriever, some))
        for source, halves in results.items():
            for half, ways in halves.items():
                for way, means in ways.items():
                    print(f"{source:10} {half:10} {way:22}", *(f"{name} {value}" for name, value in means.items()))
        used = MEASURED.get(RetrieverConfig().embedder, UNCALIBRATED)
        write("retrieval", {"threshold": used.threshold, "chunk_tokens": OPTIONS.chunk_tokens} | results)
        plot(results)
    if options.part != "quality":
        write("retrieval", calibration(retriever, some), part="calibration")


if __name__ == "__main__":
    main()
