"""Adjusts a request's logits before they are warped: biases, penalties, a grammar.

The adjustment of a row depends on the tokens before it: the prompt, the output, and the draft tokens before that row.
The target's and the drafter's rows are adjusted alike, so p and q stay the distributions that tokens are sampled from.
The processor keeps no state beyond these tokens, so a rollback needs no call.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rapid.sampling.grammar import Grammar
from rapid.sampling.params import LogitParams

# Reading a vocabulary takes most of a second. A thread of its own does it, so the engine's other sequences do not wait.
_builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")


class LogitProcessor:
    """Applies ``params`` to one sequence's logits, on ``device``."""

    def __init__(
        self,
        params: LogitParams,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._params, self._vocab_size = params, vocab_size
        self._bias = torch.zeros(vocab_size, device=device)
        self._bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), device=device)
        self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._in_prompt[list(params.prompt)] = True
        self._ends = torch.tensor([*params.eos, *params.stop_token_ids], dtype=torch.long, device=device)
        self._grammar: Future[Grammar] | None = None
        if params.grammar is not None:
            assert tokenizer is not None
            self._grammar = _builder.submit(Grammar, params.grammar, tokenizer, vocab_size, params.eos)

    def num_allowed(self, output: list[int], tokens: list[int]) -> int:
        """How many of ``tokens`` may follow ``output``: up to the first that breaks the grammar."""
        return len(tokens) if self._grammar is None else self._grammar.result().num_allowed(output, tokens)

    def __call__(self, logits: Tensor, output: list[int], draft: Sequence[int] = ()) -> Tensor:
        """``logits`` [γ+1, V], adjusted: row i follows all of ``output`` and the first i of the γ tokens of ``draft``.

        Raises:
            InvalidRequest: the grammar is too large for llguidance.
        """
        params = self._params
        logits = logits + self._bias
        if params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty:
            counts = self._counts(output, draft).to(logits.device)
            written = counts > 0
            penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits = torch.where(written | self._in_prompt, penalised, logits)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * written
        if (early := params.min_tokens - len(output)) > 0:
            logits[:early].index_fill_(-1, self._ends, -torch.inf)
        if self._grammar is not None:
            grammar = self._grammar.result()
            rows = [grammar.allowed([*output, *draft[:i]]) for i in range(len(draft) + 1)]
            logits = logits.masked_fill(~torch.from_numpy(np.stack(rows)).to(logits.device), -torch.inf)
        return logits

    def _counts(self, output: list[int], draft: Sequence[int]) -> Tensor:
        """[γ+1, V]: how often each token was written before each row."""
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=self._vocab_size).float()
        rows = counts.repeat(len(draft) + 1, 1)
        for i, token in enumerate(draft):
            rows[i + 1 :, token] += 1
        return rows
