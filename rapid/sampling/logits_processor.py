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
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rapid.kernels.transfer import upload
from rapid.models.draft_vocabulary import DraftVocabulary
from rapid.sampling.grammar import Grammar
from rapid.sampling.params import LogitParams

# Reading a vocabulary takes most of a second. A thread of its own does it, so the engine's other sequences do not wait.
_builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")


class LogitProcessor:
    """Applies ``params`` to one sequence's logits, on ``device``; with a ``vocabulary``, to logits over that alone."""

    def __init__(
        self,
        params: LogitParams,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        device: torch.device,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        self._params, self._device, self._vocabulary = params, device, vocabulary
        width = vocab_size if vocabulary is None else len(vocabulary.ids)
        biased, has_column = self._columns(list(params.logit_bias))
        self._bias = _tensors(biased, np.array(list(params.logit_bias.values()))[has_column], device)
        self._prompt, self._ends = (
            upload(self._columns(tokens)[0], "int64", device)
            for tokens in (params.prompt, [*params.eos, *params.stop_token_ids])
        )
        self._in_prompt = torch.zeros(width, dtype=torch.bool, device=device).index_fill_(0, self._prompt, True)
        self._grammar: Future[Grammar] | None = None
        if params.grammar is not None:
            assert tokenizer is not None and vocabulary is None
            self._grammar = _builder.submit(Grammar, params.grammar, tokenizer, vocab_size, params.eos)

    @property
    def has_grammar(self) -> bool:
        return self._grammar is not None

    @property
    def needed(self) -> tuple[int, ...]:
        """Tokens that a part of the vocabulary must have: the request makes them likelier, or ends with them."""
        return (*self._params.stop_token_ids, *self._params.logit_bias)

    def following(self, output: list[int]) -> Following:
        """The adjustment of the row behind ``output``, and of those behind what is written then. Without a grammar."""
        assert self._grammar is None
        return Following(self, output)

    def over(self, vocabulary: DraftVocabulary) -> LogitProcessor:
        """The same for logits over ``vocabulary`` as it is now. There must be no grammar."""
        return LogitProcessor(self._params, None, len(vocabulary.columns), self._device, vocabulary)

    def num_allowed(self, output: list[int], tokens: list[int]) -> int:
        """How many of ``tokens`` may follow ``output``: up to the first that breaks the grammar."""
        return len(tokens) if self._grammar is None else self._grammar.result().num_allowed(output, tokens)

    def __call__(self, logits: Tensor, output: list[int], draft: Sequence[int] = ()) -> Tensor:
        """``logits`` [γ+1, V or N], adjusted: row i follows ``output`` and the first i of the γ tokens of ``draft``.

        Raises:
            InvalidRequest: the grammar is too large for llguidance.
        """
        params = self._params
        logits = logits.clone()
        if params.logit_bias:
            ids, bias = self._bias
            logits.index_add_(-1, ids, bias.expand(len(logits), -1))
        if params.repetition_penalty != 1:
            logits.index_copy_(-1, self._prompt, self._repeated(logits.index_select(-1, self._prompt)))
        if params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty:
            tokens, counted = _counts(output, draft)
            columns, has_column = self._columns(tokens)
            ids, counts = _tensors(columns, counted[:, has_column], logits.device)
            values, written = logits.index_select(-1, ids), counts > 0
            # The prompt's tokens have had this penalty.
            values = torch.where(written & ~self._in_prompt[ids], self._repeated(values), values)
            values -= params.frequency_penalty * counts + params.presence_penalty * written
            logits.index_copy_(-1, ids, values)
        if (early := params.min_tokens - len(output)) > 0:
            logits[:early].index_fill_(-1, self._ends, -torch.inf)
        if self._grammar is not None:
            grammar = self._grammar.result()
            rows = [grammar.allowed([*output, *draft[:i]]) for i in range(len(draft) + 1)]
            logits = logits.masked_fill(~upload(rows, "bool", logits.device), -torch.inf)
        return logits

    def _columns(self, tokens: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(the columns of those ``tokens`` [n] that have one, which of them do)."""
        ids = np.asarray(tokens, np.int64)
        if self._vocabulary is not None:
            ids = self._vocabulary.columns[ids]
        return ids[ids >= 0], ids >= 0

    def _repeated(self, logits: Tensor) -> Tensor:
        penalty = self._params.repetition_penalty
        return torch.where(logits > 0, logits / penalty, logits * penalty)


class Following:
    """Adjusts one row after another as `LogitProcessor` does, of a text that grows on the device, not on the host.

    What the tokens before a row do to it is kept as rows, [V or N], and each written token changes one number of them:
    ``in_text`` and ``is_written`` (the prompt's tokens are in the text, too), and ``lowered``, which is subtracted.
    """

    def __init__(self, processor: LogitProcessor, output: list[int]) -> None:
        self._processor, self._num_written = processor, len(output)
        params, vocabulary, device = processor._params, processor._vocabulary, processor._device
        tokens, counts = _counts(output, ())
        columns, has_column = processor._columns(tokens)
        ids, counted = _tensors(columns, counts[0, has_column], device)
        self.params = params
        self._columns = None if vocabulary is None else upload(vocabulary.columns, "int64", device)
        self.in_text = processor._in_prompt.index_fill(0, ids, True)
        self.is_written = torch.zeros_like(self.in_text).index_fill_(0, ids, True)
        lowered = params.frequency_penalty * counted + params.presence_penalty
        self.lowered = torch.zeros(len(self.in_text), device=device).index_copy_(0, ids, lowered)

    @property
    def may_end(self) -> bool:
        """Whether the text has as many tokens as it must have."""
        return self._num_written >= self.params.min_tokens

    def bias(self) -> Tensor:
        """What is added to each logit, [V or N]."""
        return torch.zeros_like(self.lowered).index_add_(0, *self._processor._bias)

    def __call__(self, logits: Tensor) -> Tensor:
        """``logits`` [1, V or N] of the next token."""
        processor, params = self._processor, self.params
        if params.logit_bias:
            ids, bias = processor._bias
            logits = logits.index_add(-1, ids, bias.unsqueeze(0))
        if params.repetition_penalty != 1:
            logits = torch.where(self.in_text, processor._repeated(logits), logits)
        if params.frequency_penalty or params.presence_penalty:
            logits = logits - self.lowered
        if not self.may_end:
            logits = logits.index_fill(-1, processor._ends, -torch.inf)
        return logits

    def write(self, token: Tensor) -> None:
        """``token`` [1] is written, on the device."""
        params, column = self.params, token if self._columns is None else self._columns[token]
        self._num_written += 1
        if params.repetition_penalty != 1:
            self.in_text.index_fill_(0, column, True)
        if params.frequency_penalty or params.presence_penalty:
            lowered = params.frequency_penalty + params.presence_penalty * ~self.is_written[column]
            self.lowered.index_add_(0, column, lowered)
            self.is_written.index_fill_(0, column, True)


def _counts(output: list[int], draft: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(the ids [k] of all tokens of ``output`` and ``draft``, how often each was written before each row [γ+1, k])."""
    ids, index = np.unique(np.array([*output, *draft], np.int64), return_inverse=True)
    counts = np.zeros((len(draft) + 1, len(ids)), np.float32)
    counts[:] = np.bincount(index[: len(output)], minlength=len(ids))
    for i, column in enumerate(index[len(output) :]):
        counts[i + 1 :, column] += 1
    return ids, counts


def _tensors(ids: ArrayLike, values: ArrayLike, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids as int64 and values as float32, on ``device``."""
    return upload(ids, "int64", device), upload(values, "float32", device)
