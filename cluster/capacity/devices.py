"""The time of one forward pass on a device: a roofline, with the fractions of it that a pass reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.capacity.shapes import ServedModel


@dataclass(frozen=True)
class Device:
    """One accelerator, or one measured machine. Bytes, bytes per second, FLOP per second, seconds.

    ``memory``, ``bandwidth``, ``flops`` (dense, 16-bit numbers) and ``link`` (one direction, to its neighbours) are
    data sheet values. The other fields are the fractions that a pass reaches: ``weights`` and ``cache`` of the
    bandwidth while it reads weights, or keys and values; ``products`` and ``attention`` of the FLOP/s. ``layer_s`` is
    the overhead of a layer. The defaults are assumptions for good GPU kernels under CUDA graphs, not measurements of
    this project; for a measured machine, `python -m benchmarks.plan` fits them.

    A pass over several devices is not captured as a graph. The host then launches each layer's kernels one by one,
    which takes ``eager_layer_s``: about 25 kernels at 6 µs, by assumption. The device works behind the host, and cannot
    be faster.
    """

    memory: float
    bandwidth: float
    flops: float
    link: float = 0.0
    link_latency_s: float = 10e-6
    weights: float = 0.8
    cache: float = 0.7
    products: float = 0.6
    attention: float = 0.4
    layer_s: float = 10e-6
    eager_layer_s: float = 150e-6

    def pass_s(self, model: ServedModel, batch: int, tokens: int, context: int, *, rows: int | None = None) -> float:
        """Seconds for one pass, which appends ``tokens`` to each of ``batch`` sequences that hold ``context`` tokens.

        The time is the sum over the parts of max(bytes ÷ bandwidth, operations ÷ rate). The layers' products read every
        weight once. The head makes logits of ``rows`` tokens a sequence (of all tokens, by default). Attention reads
        each sequence's keys and values, and does 4 operations for each query, head, dimension and visible token. Two
        all-reduces a layer join the ranks. Stages work one after another, and each sends its last layer's output to the
        next.
        """
        shape, ranks = model.shape, model.num_ranks
        rows = tokens if rows is None else rows
        # The rate depends on the width of the numbers: float32 runs at half the rate of bfloat16.
        rate = self.flops * 2 / model.number_bytes

        def product_s(parameters: int, weight_bytes: float, num_tokens: int) -> float:
            read_s = parameters * weight_bytes / (self.bandwidth * self.weights)
            return max(read_s, 2 * parameters * num_tokens / (rate * self.products)) / ranks if num_tokens else 0.0

        cached = batch * (context + tokens) * shape.num_layers * model.kv_bytes_per_layer
        cache_s = cached / (self.bandwidth * self.cache)
        seen = tokens * (context + (tokens + 1) / 2)  # query-key pairs of a sequence: causal
        operations = 4 * shape.num_layers * math.ceil(shape.num_heads / ranks) * shape.head_dim * seen * batch
        attention_s = max(cache_s, operations / (rate * self.attention))
        products_s = product_s(shape.layer_parameters, model.weight_bytes, batch * tokens)
        products_s += product_s(shape.head_parameters, model.head_weight_bytes, batch * rows)
        made = batch * tokens * shape.hidden_size * model.number_bytes
        joining_s = 2 * shape.num_layers * self._all_reduce_s(made, ranks)
        if model.num_stages > 1:
            joining_s += (model.num_stages - 1) * (self.link_latency_s + made / self.link)
        working_s = products_s + attention_s + joining_s + shape.num_layers * self.layer_s
        return max(working_s, shape.num_layers * self.eager_layer_s) if model.num_devices > 1 else working_s

    def prefill_s(self, model: ServedModel, tokens: int, chunk: int) -> float:
        """Seconds to prefill ``tokens`` in passes of ``chunk``; only the last token needs logits."""
        starts = range(0, tokens, chunk)
        return sum(self.pass_s(model, 1, min(chunk, tokens - i), i, rows=i + chunk >= tokens) for i in starts)

    def _all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        """A ring: each rank sends 2 (n - 1) ÷ n of the bytes."""
        if ranks == 1:
            return 0.0
        return self.link_latency_s + 2 * (ranks - 1) / ranks * num_bytes / self.link


# NVIDIA's data sheets: H100 SXM, H200 SXM, HGX B200, A100 80GB SXM, L40S, A10. FLOP/s are without sparsity. NVLink is
# quoted for both directions together, halved here; L40S and A10 have PCIe 4.0 x16 instead, and a slower start.
GPUS = {
    "h100": Device(80e9, 3.35e12, 989e12, link=450e9),
    "h200": Device(141e9, 4.8e12, 989e12, link=450e9),
    "b200": Device(180e9, 8.0e12, 2250e12, link=900e9),
    "a100": Device(80e9, 2.039e12, 312e12, link=300e9),
    "l40s": Device(48e9, 0.864e12, 362e12, link=32e9, link_latency_s=30e-6),
    "a10": Device(24e9, 0.6e12, 125e12, link=32e9, link_latency_s=30e-6),
}
