"""What drafting gains at 32K tokens if as many drafted tokens stand as at 7K.

Positions are scaled at 32K, so the model writes and drafts worse there than one that was trained for such a length.
Here the costs are those that were measured at 32K, and the rounds those of 7K: of γ drafted tokens a round emits τ.

    gain = τ · t_plain / (t_verify + (γ − γ_32K) · t_more + γ · t_draft + t_between)

t_more is what one more token costs a verification, from `benchmarks.steps`.
"""

from __future__ import annotations

import statistics

import rapid  # noqa: F401 (before torch)

# isort: split

from benchmarks.common.results import read, write


def main() -> None:
    short, long = (read(f"workload_{part}")["kinds"]["a"]["rows"] for part in ("a", "32000_a"))
    rounds, drafted, emitted = (sum(row["rapid"][name] for row in short) for name in ("rounds", "drafted", "emitted"))
    gamma, per_round = drafted / rounds, emitted / rounds
    [step] = [row for row in read("steps")["rows"] if (row["weights"], row["context"]) == ("bfloat16", 32768)]
    more_ms = (step["verify 5"] - step["plain step"]) / 4
    rows = []
    for row in long:
        own, plain = row["rapid"], row["autoregressive"]
        verify_ms = own["verification_ms"] + (gamma - own["drafted"] / own["rounds"]) * more_ms
        round_ms = verify_ms + gamma * own["draft_token_ms"] + own["between_ms"]
        gain = per_round * 1e3 / plain["tokens_per_second"] / round_ms
        rows.append({"document": row["document"], "measured": own["ratio"], "at_the_acceptance_of_7k": round(gain, 2)})
        print(rows[-1])
    results = {"tokens_per_round": round(per_round, 2), "gamma": round(gamma, 2), "more_ms": round(more_ms, 2)}
    median = round(statistics.median(row["at_the_acceptance_of_7k"] for row in rows), 2)
    write("same_acceptance", results | {"rows": rows, "median": median})


if __name__ == "__main__":
    main()
