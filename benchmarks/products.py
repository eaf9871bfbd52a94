"""The linear layers of a decode step with 1, 5 and 64 rows: plain, repacked for oneDNN, int8 and int4 weights."""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
import torch.nn.functional as F

from benchmarks.local import MODEL
from benchmarks.results import write
from benchmarks.steps import median_ms
from rapid import catalog
from rapid.compute import compute
from rapid.linear import make_linear


def measure() -> list[dict[str, float | int]]:
    """Milliseconds for all of them one after the other, so that each reads its weights from memory."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(catalog.resolve(MODEL), dtype=torch.bfloat16)
    weights = [m.weight.detach() for m in network.model.modules() if isinstance(m, torch.nn.Linear)]
    kinds = {"plain": [lambda rows, w=w: F.linear(rows, w) for w in weights]}
    kinds |= {name: [make_linear(w, None, scheme) for w in weights] for name, scheme in SCHEMES.items()}
    table = []
    for num_rows in (1, 5, 64):
        rows = {w.shape[1]: torch.randn(num_rows, w.shape[1], dtype=torch.bfloat16) for w in weights}
        row: dict[str, float | int] = {"rows": num_rows}
        for name, products in kinds.items():

            def step(products: list = products) -> None:  # type: ignore[type-arg]
                for weight, product in zip(weights, products, strict=True):
                    product(rows[weight.shape[1]])  # noqa: B023 (called before the next iteration)

            with torch.inference_mode():
                row[name] = round(median_ms(step, 9), 2)
        table.append(row)
        print(row, flush=True)
    return table


SCHEMES = {"repacked": "none", "int8": "int8", "int4": "int4"}

if __name__ == "__main__":
    write("products", {"milliseconds": compute(measure)})
