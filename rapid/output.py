"""Turns the tokens of each round into the text that the client may see, and decides where the output ends."""

from __future__ import annotations

from typing import NamedTuple

from rapid.events import NamedToken, TokenLogprobs
from rapid.request import GenerationRequest
from rapid.speculation.draft import Logprobs
from rapid.text.tokenizer import Detokenizer, spell


class Written(NamedTuple):
    """The tokens of a round that are output: ``pieces[i]`` is the text that ``tokens[i]`` completed."""

    tokens: list[int]
    pieces: list[str]
    logprobs: list[TokenLogprobs]


class OutputWriter:
    """Writes one completion of up to ``max_tokens``. ``reason`` says why the output ended; it is None before.

    ``stop`` is the stop string or the stop token that ended it.

    The writer cuts the text at a stop string, and discards the tokens behind the one that completes it. It holds back
    the log-probabilities of a token as long as the token's text.
    """

    def __init__(self, request: GenerationRequest, eos: frozenset[int], max_tokens: int) -> None:
        self.reason: str | None = None
        self.stop: str | int | None = None
        self._tokenizer, self._room = request.prompt.tokenizer, max_tokens
        self._stop_tokens = frozenset(request.stop_token_ids)
        self._ends = eos | self._stop_tokens
        self._text = Detokenizer(self._tokenizer, request.stop, request.min_tokens, request.shown_tokens)
        self._num_out = 0  # how many tokens' log-probabilities were released
        self._held: list[TokenLogprobs] = []

    def write(self, tokens: list[int], logprobs: list[Logprobs]) -> Written:
        """Adds a round's ``tokens``, up to the end of the output; ``logprobs`` has an entry for each token, or none."""
        pieces: list[str] = []
        for token in tokens[: self._room]:
            pieces.append("" if token in self._stop_tokens else self._text.push(token))
            if token in self._ends or self._text.stopped:
                self.reason = "stop"
                self.stop = token if token in self._stop_tokens else self._text.stopped
                break
        self._room -= len(pieces)
        if not self._room and self.reason is None:
            self.reason = "length"
        stands = tokens[: len(pieces)]
        self._held += [self._name(t, of) for t, of in zip(stands, logprobs, strict=False) if t not in self._ends]
        return Written(stands, pieces, self._release())

    def finish(self) -> Written:
        """The text and the log-probabilities that were held back."""
        return Written([], [self._text.finish()], self._release())

    def _release(self) -> list[TokenLogprobs]:
        if not self._held:
            return []
        num_new = max(0, self._text.num_shown - self._num_out)
        released, self._held = self._held[:num_new], self._held[num_new:]
        self._num_out += len(released)
        return released

    def _name(self, token: int, logprobs: Logprobs) -> TokenLogprobs:
        def name(token: int, logprob: float) -> NamedToken:
            return NamedToken(token, spell(self._tokenizer, token), logprob)

        return TokenLogprobs(name(token, logprobs.logprob), [name(*each) for each in logprobs.top])
