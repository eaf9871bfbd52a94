"""The peers that RAPID is compared with, each on today's transformers with its stock attention and caches.

`released` decodes like the paper's released code as far as speed matters: a drafter on the retrieved context, γ = 10
every round, one pass of the target over the draft, caches cropped.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from rapid.weights import embedded_models

GAMMA = 10


def load(model: str, dtype: torch.dtype) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded_models.resolve(model), dtype=dtype)
    return network.eval()


class _Clock(BaseStreamer):
    """The times at which tokens came, after the prompt."""

    def __init__(self) -> None:
        self.prompt_seen, self.times, self.counts = False, [], []

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass

    def tokens_per_second(self) -> float:
        return float(sum(self.counts[1:]) / (self.times[-1] - self.times[0]))


@torch.inference_mode()
def prefilled(network: PreTrainedModel, tokens: list[int]) -> tuple[DynamicCache, float]:
    """A cache of all of ``tokens`` but the last, and the speed of its prefill in tokens per second."""
    cache = DynamicCache()
    started = time.perf_counter()
    network(input_ids=torch.tensor([tokens[:-1]]), past_key_values=cache, logits_to_keep=1)
    return cache, (len(tokens) - 1) / (time.perf_counter() - started)


def generated(network: PreTrainedModel, tokens: list[int], cache: DynamicCache, new_tokens: int, **how: Any) -> float:
    """Tokens per second of `generate`, greedy, after the first."""
    clock = _Clock()
    ids = torch.tensor([tokens])
    network.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=copy.deepcopy(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **how,
    )
    return clock.tokens_per_second()


@torch.inference_mode()
def released(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokens: list[int],
    cache: DynamicCache,
    short: list[int],
    new: int,
) -> float:
    """Tokens per second of greedy speculative decoding with a fixed draft length, after the first round."""
    far, near = copy.deepcopy(cache), prefilled(drafter, short)[0]
    output: list[int] = []
    started, counted = 0.0, 0
    while len(output) < new:
        draft: list[int] = []
        while len(draft) < GAMMA:
            unread = (short + output + draft)[near.get_seq_length() :]
            logits = drafter(input_ids=torch.tensor([unread]), past_key_values=near, logits_to_keep=1).logits
            draft.append(int(logits[0, -1].argmax()))
        unread = (tokens + output)[far.get_seq_length() :] + draft
        logits = target(input_ids=torch.tensor([unread]), past_key_values=far, logits_to_keep=GAMMA + 1).logits
        best = logits[0].argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(draft) if best[i] != token), GAMMA)
        output += [*draft[:accepted], best[accepted]]
        for read, known in ((far, tokens), (near, short)):
            too_many = read.get_seq_length() - (len(known) + len(output) - 1)
            if too_many > 0:
                read.crop(-too_many)
        if not started:
            started, counted = time.perf_counter(), len(output)
    return (len(output) - counted) / (time.perf_counter() - started)
