"""What a request asks of the logits themselves, before they are warped: biases, penalties, a grammar.

Each row is adjusted by the tokens before it: the prompt, what was written, and the draft tokens that stand before that
row. The target's rows and the drafter's are adjusted alike, so p and q stay what is really sampled from. Nothing is
remembered but what those tokens say, so there is nothing to roll back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rapid.errors import InvalidRequest
from rapid.sampling.grammar import Grammar

if TYPE_CHECKING:
    from rapid.models.info import ModelInfo

# A model's vocabulary takes most of a second, which the sequences that an engine has already need not wait for.
_builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")


@dataclass(frozen=True)
class LogitParams:
    """What one request asks for, in the order in which it is applied; penalties are vLLM's.

    ``logit_bias`` is added to the logits of its token ids. ``repetition_penalty`` divides a positive logit and
    multiplies a negative one, of every token of the prompt or the output. ``frequency_penalty`` is subtracted as often
    as a token was written, ``presence_penalty`` once. ``grammar`` leaves the tokens that may follow. Neither an end of
    sequence nor one of ``stop_token_ids`` comes among the first ``min_tokens``.

    ``prompt`` and ``eos`` are filled in by `on`: a drafter, which reads another prompt, counts the target's.

    Raises:
        InvalidRequest: a value is out of range; ``param`` names the field.
    """

    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: str | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)!r}", param=param)

        for param in ("frequency_penalty", "presence_penalty"):
            require(-2 <= getattr(self, param) <= 2, param, "between -2 and 2")
        usable = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        require(usable, "repetition_penalty", "above 0")
        require(all(-100 <= b <= 100 for b in self.logit_bias.values()), "logit_bias", "between -100 and 100")

    def on(self, prompt: list[int], target: ModelInfo) -> LogitParams | None:
        """As the two sequences of a request about ``prompt`` are opened with; None where nothing is asked for.

        Raises:
            InvalidRequest: a biased token does not exist, the model can end no grammar, or every token is an end.
        """
        if self == LogitParams():
            return None
        beyond = [token for token in self.logit_bias if not 0 <= token < target.vocab_size]
        if beyond:
            raise InvalidRequest(f"logit_bias: there is no token {beyond[0]} in {target.name}", param="logit_bias")
        if self.grammar is not None and not target.eos_token_ids:
            what = f"response_format: {target.name} has no end of sequence to end a grammar with"
            raise InvalidRequest(what, param="response_format")
        if self.min_tokens and len({*self.stop_token_ids, *target.eos_token_ids}) >= target.vocab_size:
            raise InvalidRequest("stop_token_ids: with min_tokens one token must be left", param="stop_token_ids")
        counted = tuple(sorted(set(prompt))) if self.repetition_penalty != 1 else ()
        return replace(self, prompt=counted, eos=tuple(sorted(target.eos_token_ids)))


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
            InvalidRequest: the grammar is too much for its library.
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
            logits = logits.masked_fill(~torch.stack(rows).to(logits.device), -torch.inf)
        return logits

    def _counts(self, output: list[int], draft: Sequence[int]) -> Tensor:
        """[γ+1, V]: how often each token was written before each row."""
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=self._vocab_size).float()
        rows = counts.repeat(len(draft) + 1, 1)
        for i, token in enumerate(draft):
            rows[i + 1 :, token] += 1
        return rows
