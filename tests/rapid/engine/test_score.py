"""Scoring given tokens: one pass, the log-probabilities of transformers, and many sequences beside each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from running import done, opened, random_tokens
from transformers import PreTrainedModel

from rapid.engine import score as scoring
from rapid.engine.engine import Engine
from rapid.engine.messages import ScoreRequest
from rapid.engine.score import score
from rapid.models.model import Model


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("max_rows", [1, 8, 256])
def test_scores_are_the_log_probabilities_of_transformers(
    tiny_network: Callable[..., PreTrainedModel],
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    max_rows: int,
) -> None:
    monkeypatch.setattr(scoring, "MAX_ROWS", max_rows)
    network = tiny_network(32)
    runner = engine(Model(tiny_network(32), None, "tiny"), max_batch_tokens=16)  # fewer than some passes need
    prompts = [random_tokens(size, seed) for seed, size in enumerate((1, 5, 20))]
    tokens = [random_tokens(length, 10 + seed) for seed in range(3)]
    sequences = [opened(runner, prompt) for prompt in prompts]
    before = runner.stats().forward_passes
    futures = [runner.submit(score(s, ScoreRequest(t))) for s, t in zip(sequences, tokens, strict=True)]
    found = [done(future).logprobs for future in futures]
    if max_rows >= length:
        assert runner.stats().forward_passes - before <= 3  # at most one for each
    for prompt, own, logprobs in zip(prompts, tokens, found, strict=True):
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + own])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(own)]
        assert logprobs == pytest.approx(expected, abs=1e-4)
