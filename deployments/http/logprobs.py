"""Log-probabilities in the forms of the endpoints: of chats, of completions, and vLLM's of a prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from rapid.events import NamedToken, PromptToken, TokenLogprobs


def chat_logprobs(entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def shown(token: NamedToken) -> dict[str, Any]:
        return {"token": _spelled(token), "logprob": token.logprob, "bytes": list(token.spelled)}

    content = [shown(chosen) | {"top_logprobs": [shown(token) for token in top]} for chosen, top in entries]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The `logprobs` of one choice of a completion, whose offsets count the characters of its text."""

    def __init__(self) -> None:
        self._offset, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("ignore")

    def echoed(self, tokens: Sequence[PromptToken], echoed: str) -> dict[str, Any]:
        """Those of the prompt, whose text is ``echoed``. The first token has none, as nothing comes before it."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            piece = self._decoder.decode(token.spelled)
            # Tokenizers put tokens before a text that it does not show, and a space before its first word.
            for shown in (piece, piece.removeprefix(" ")):
                if echoed.startswith(shown, self._offset):
                    self._offset += len(shown)
                    break
        self._offset = len(echoed)
        first, *rest = tokens
        of_rest = _columns([token.logprobs for token in rest if token.logprobs is not None])
        of_first: dict[str, list[Any]] = {
            "tokens": [_name(first.spelled)],
            "token_logprobs": [None],
            "top_logprobs": [None],
        }
        return {name: of_first[name] + of_rest[name] for name in of_first} | {"text_offset": offsets}

    def written(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Those of tokens of the answer."""
        offsets = []
        for chosen, _ in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(chosen.spelled))
        return _columns(entries) | {"text_offset": offsets}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `logprobs` of all ``parts`` of a completion's text."""
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


def prompt_logprobs(tokens: Sequence[PromptToken]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token null, or the likeliest in its place and itself, by id."""
    return [None if token.logprobs is None else _by_id(token.logprobs, token.rank) for token in tokens]


def _by_id(entry: TokenLogprobs, rank: int | None) -> dict[str, Any]:
    ranked = [*enumerate(entry.top, 1), (rank, entry.chosen)]
    return {
        str(token.token): {"logprob": token.logprob, "rank": place, "decoded_token": _spelled(token)}
        for place, token in ranked
    }


def _columns(entries: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
    return {
        "tokens": [_spelled(chosen) for chosen, _ in entries],
        "token_logprobs": [chosen.logprob for chosen, _ in entries],
        "top_logprobs": [{_spelled(token): token.logprob for token in (*top, chosen)} for chosen, top in entries],
    }


def _spelled(token: NamedToken) -> str:
    return _name(token.spelled)


def _name(spelled: bytes) -> str:
    """A token's text; where its bytes are no whole characters, the bytes as OpenAI writes them."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
