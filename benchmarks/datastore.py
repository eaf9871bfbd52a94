"""A datastore of two novels: how long building, adding and removing take, how large it is, how long a search takes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common.local import MODEL
from benchmarks.common.novels import build
from benchmarks.common.results import write
from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import LONGEST_MATCH, SEPARATOR, Datastore, suffix_array
from rapid.text.tokenizer import fingerprint, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        built = build(Path(place), MODEL)
        folder = DatastoreFolder(Path(place), fingerprint(load_tokenizer(MODEL)))
        results = {name: built[name] for name in ("texts", "tokens", "segments", "bytes", "seconds")}
        datastore = Datastore(folder.segments())
        tokens = np.concatenate([segment.tokens for segment in folder.segments()])
        results["bytes_per_token"] = round(built["bytes"] / built["tokens"], 2)
        results["sorting_ms"] = _ms(lambda: suffix_array(tokens))
        results["searches"] = {
            "in a text of the datastore": _searches(datastore, tokens, options.searches),
            "in the same tokens in random order": _searches(
                datastore, np.random.default_rng(0).permutation(tokens), options.searches
            ),
        }
        results["adding_a_text_of_500_tokens_ms"] = _ms(lambda: folder.add("an answer", tokens[:500]))
        results["removing_a_novel_ms"] = _ms(lambda: folder.remove(folder.texts()[0].name))
    for name, value in results.items():
        print(f"{name}: {value}")
    write("datastore", results)


def _ms(work) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    work()
    return round((time.perf_counter() - started) * 1e3, 1)


def _searches(datastore: Datastore, text: np.ndarray, number: int) -> dict[str, float]:
    """Microseconds of `Datastore.find` at random places of ``text``, and what it finds."""
    places = np.random.default_rng(1).integers(LONGEST_MATCH, len(text), number)
    times, lengths, drafted = [], [], []
    for place in places:
        tail = text[place - LONGEST_MATCH : place]
        if SEPARATOR in tail:
            continue
        started = time.perf_counter()
        found = datastore.find(tail.tolist())
        times.append((time.perf_counter() - started) * 1e6)
        lengths.append(found.length if found else 0)
        drafted.append(len(found.tokens) if found else 0)
    return {
        "median_us": round(statistics.median(times), 1),
        "p95_us": round(statistics.quantiles(times, n=20)[-1], 1),
        "mean_match": round(statistics.mean(lengths), 2),
        "mean_draft": round(statistics.mean(drafted), 2),
    }


if __name__ == "__main__":
    main()
