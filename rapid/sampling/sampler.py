"""Turns logits into a probability distribution, and samples a token from a distribution.

The warping (temperature, top-k, top-p, min-p, in that order, as in transformers) applies alike to the target's and the
drafter's logits, so the paper's p and q are always the distributions that tokens are sampled from.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.cpu.ir_builder import LANES
from rapid.kernels.cpu.jit import Kernel, available
from rapid.sampling import truncation_ir
from rapid.sampling.noise import exponential
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams, truncates
from rapid.sampling.truncation import truncate, truncate_largest
from rapid.sampling.truncation_ir import MOST, write_truncation

_BLOCK = 64  # token ids that are drawn as one


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution of ``logits`` [..., V] under ``params``: same shape, rows sum to 1.

    Temperature 0 gives a one-hot row at the argmax; every verification rule then reduces to greedy decoding.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    rows = logits.reshape(-1, logits.shape[-1])
    return warp(rows, RowParams.of([params], logits.device)).view_as(logits)


def warp(logits: Tensor, params: RowParams) -> Tensor:
    """`probabilities`, of rows [R, V] that have ``params`` of their own; no temperature may be 0."""
    return truncate(tempered(logits, params.temperature), params)


def warp_to_few(logits: Tensor, params: RowParams) -> tuple[Tensor, Tensor] | None:
    """`warp` of rows on a CPU that keep few tokens: the ids of the 64 likeliest [R, 64] and their probabilities.

    Returns None if a row keeps 64 tokens or more, or there is no kernel for the rows. It costs a fraction of `warp`,
    and what it returns is read a dozen times by a verification.
    """
    num_rows, size = logits.shape
    rows = params.rows if len(params.rows) > 1 else [params.rows[0]] * num_rows
    may_be_few = all(truncates(row, size) and row.top_k < MOST for row in rows)
    has_kernel = logits.device.type == "cpu" and logits.dtype == torch.float32 and size % LANES == 0 and available()
    if not (may_be_few and has_kernel and size > MOST):
        return None
    logits = logits.contiguous()
    ids, probs = torch.empty(num_rows, MOST, dtype=torch.int64), torch.empty(num_rows, MOST)
    for i, row in enumerate(rows):
        numbers = np.array([max(row.temperature, torch.finfo(logits.dtype).tiny), row.top_p, row.min_p])
        given = logits[i].data_ptr(), size, numbers.ctypes.data, row.top_k, MOST
        _few_kernel().alone(*given, ids[i].data_ptr(), probs[i].data_ptr())
    return None if (probs[:, -1] > 0).any() else (ids, probs)


@functools.cache
def _few_kernel() -> Kernel:
    return Kernel("truncation", write_truncation, truncation_ir.__file__)


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Warps one row of so many logits: what has to be compiled is compiled now, and not during a request."""
    warp_to_few(torch.zeros(1, vocab_size, device=device), RowParams.of([SamplingParams(top_k=1)], device))


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(z/T) of rows [R, V], T being ``temperature`` [R, 1]; some distribution where that is 0."""
    # A tiny temperature must neither turn the largest logits into inf - inf nor, rounded to 0, into 0 / 0.
    temperature = temperature.clamp_min(torch.finfo(logits.dtype).tiny).to(logits.dtype)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature).softmax(-1)


def warp_largest(logits: Tensor, top: Tensor, params: RowParams) -> Tensor:
    """`warp` of ``logits`` [R, V], at their k largest values ``top`` [R, k] alone, which are in descending order.

    What lies below them is not looked at, but for its mass: a row whose top-k is above k is cut as if it were k.
    """
    return truncate_largest(tempered_largest(logits, top, params), params)


def tempered_largest(logits: Tensor, top: Tensor, params: RowParams) -> Tensor:
    """`tempered` of ``logits`` [R, V], at their k largest values ``top`` [R, k] alone, in descending order."""
    temperature = params.temperature.clamp_min(torch.finfo(logits.dtype).tiny).to(logits.dtype)
    highest = top[:, :1]
    probs = ((top - highest) / temperature).exp()
    mass = ((logits - highest) / temperature).exp_().sum(-1, keepdim=True)
    return probs / mass


def sample(probs: Tensor, keys: Tensor) -> Tensor:
    """Samples one index per row of ``probs`` [..., V] (rows need not sum to 1), with its key [...]: shape [...].

    First a block of 64 ids wins by its mass, then a token of the block: P(block) · P(token | block). Each block and
    each of the 64 places in a block has a number of its own, V/64 + 64 in all. So a token is replaced by another only
    where the two were nearly equal: no rounding of a sum over the vocabulary can do it.
    """
    size = probs.shape[-1]
    width = min(_BLOCK, size)
    if size % width:
        probs = torch.nn.functional.pad(probs, (0, -size % width))
    blocks = probs.unflatten(-1, (-1, width))  # [..., V/64, 64]
    num_blocks = blocks.shape[-2]
    numbers = exponential(keys, torch.arange(width + num_blocks, device=probs.device))
    block = (blocks.sum(-1, dtype=torch.float64) / numbers[..., width:]).argmax(-1, keepdim=True)
    inside = blocks.take_along_dim(block.unsqueeze(-1), -2).squeeze(-2)  # [..., 64]
    token: Tensor = (inside / numbers[..., :width]).argmax(-1) + width * block.squeeze(-1)
    return token


def first_to_come(weights: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """Samples one of the token ``ids`` [..., k] by their ``weights`` [..., k], with its key [...]: its place [..., 1].

    A token's number goes by its id, so it does not matter in which order the tokens come.
    """
    return (weights / exponential(keys, ids)).argmax(-1, keepdim=True)
