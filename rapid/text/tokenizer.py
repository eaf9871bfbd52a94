"""Tokenizers: loads one, checks whether two are the same, and turns tokens back into a stream of text."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from rapid.errors import ModelFileError, ModelMismatch
from rapid.weights import embedded_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an embedded model, a local folder, or a hub id.

    Raises:
        ModelFileError: the tokenizer is missing or unreadable, or is not a fast tokenizer.
    """
    try:
        files = embedded_models.resolve(ref)
        tokenizer: PreTrainedTokenizerBase = _loader_of(files).from_pretrained(files, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"the tokenizer of {ref!r} could not be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelFileError(f"{ref!r} has no fast tokenizer (tokenizer.json); RAPID needs one for streaming")
    return tokenizer


def _loader_of(files: str) -> Any:
    """The class that loads the tokenizer in ``files``: AutoTokenizer, or the class that AutoTokenizer would choose.

    AutoTokenizer imports torch to choose the class: some 280 MB in a process that holds no model. If the files name the
    class that reads every tokenizer.json, this import is not needed.
    """
    config = Path(files, "tokenizer_config.json")
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def check_same_tokenizer(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> None:
    """Checks that both models mean the same text by each token id, because a draft is a list of token ids.

    The vocabularies, the special tokens and the way of splitting text must agree. A checkpoint may pad its output rows
    beyond the tokenizer.

    Raises:
        ModelMismatch: the message names the first difference, with an example.
    """

    def refuse(what: str) -> None:
        raise ModelMismatch(
            f"target and drafter have different tokenizers: {what}. A drafter must share the target's tokenizer "
            "(another size of the same model family usually does)."
        )

    ours, theirs = target.get_vocab(), drafter.get_vocab()
    if ours != theirs:
        moved = [token for token in ours if token in theirs and ours[token] != theirs[token]]
        if moved:
            token = min(moved, key=ours.__getitem__)
            refuse(f"the token {token!r} has id {ours[token]} in the target and {theirs[token]} in the drafter")
        lone = min(set(ours) ^ set(theirs), key=lambda token: ours.get(token, theirs.get(token, 0)))
        refuse(
            f"{len(ours):,} tokens in the target and {len(theirs):,} in the drafter; "
            f"{lone!r} is only in the {'target' if lone in ours else 'drafter'}"
        )
    for name in _NAMED:
        if getattr(target, name) != getattr(drafter, name):
            refuse(f"{name} is {getattr(target, name)!r} in the target and {getattr(drafter, name)!r} in the drafter")
    for sample in _SAMPLES:
        if (a := _ids(target, sample)) != (b := _ids(drafter, sample)):
            refuse(f"they split {sample!r} into {len(a)} and {len(b)} tokens, {a[:8]}… and {b[:8]}…")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what `check_same_tokenizer` compares: tokenizers with the same one mean the same by a token's id."""
    identity = [
        sorted(tokenizer.get_vocab().items()),
        [getattr(tokenizer, name) for name in _NAMED],
        [_ids(tokenizer, sample) for sample in _SAMPLES],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


_NAMED = ("bos_token", "eos_token")

# These texts show most differences in normalisation and splitting: spaces, digits, case, accents, scripts, emoji, code.
_SAMPLES = (
    "The 3 quick  brown foxes\n\n\tjumped over 1234567890 lazy dogs; don't they?",
    "Ünïcödé naïve ﬁancée e\u0301 中文，没有空格。 русский العربية हिन्दी 👩‍🚀",
    "def f(x):\n    return x**2  # 3.14159 == π\r\n",
)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte: itself if printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert alphabet.keys() == set(ByteLevel.alphabet())
    return alphabet


_BYTES = _byte_alphabet()
_REPLACEMENT = "\ufffd"  # stands for bytes that are no character


def spell(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of one token; they may be incomplete characters."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) and all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    if hexadecimal := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(hexadecimal[1])
    return name.replace("▁", " ").encode()


class Detokenizer:
    """Turns tokens into text as they come. It never returns half a character, or a part of a stop string.

    ``push`` returns the text that the client may see now. ``stopped`` is the stop string that was found, or None; the
    text ends before it. The first ``min_tokens`` tokens are not searched for stop strings. Of special tokens only the
    ``shown`` ones have a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop, self._min_tokens, self._special = tuple(sorted(stop)), min_tokens, shown
        self._tokens: list[int] = []
        self._starts: list[int] = []  # where each token's text begins
        self._decoded = ""  # all text so far
        self._shown = 0  # how many characters were returned
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All text that was returned so far."""
        return self._decoded[: self._shown]

    @property
    def num_shown(self) -> int:
        """The number of tokens whose text was returned, as a whole or, at a stop string, in part."""
        if self.stopped:
            return bisect_left(self._starts, self._shown)
        all_out = self._shown == len(self._decoded)
        return len(self._starts) if all_out else bisect_right(self._starts, self._shown) - 1

    def push(self, token: int) -> str:
        """Adds one token; returns the text that it completes, which may be empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        self._starts.append(len(self._decoded))
        if token in self._special:
            self._decoded += spell(self._tokenizer, token).decode()
            self._decoder = DecodeStream(skip_special_tokens=True)
        else:
            self._decoded += self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._release(self._held_back())

    def finish(self) -> str:
        """Returns the held-back text; no more tokens may come. A character that they cut off is left out."""
        whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if self._tokens and not spell(self._tokenizer, self._tokens[-1]).endswith(_REPLACEMENT.encode()):
            whole = whole.rstrip(_REPLACEMENT)
        if not self.stopped and whole.startswith(self._decoded):
            self._decoded = whole
        return self._release(0)

    def _release(self, held_back: int) -> str:
        if not self.stopped:
            found = [(at, s) for s in self._looked_for() if (at := self._decoded.find(s, self._shown)) >= 0]
            if found:
                at, self.stopped = min(found)
                self._decoded, held_back = self._decoded[:at], 0
        end = max(self._shown, len(self._decoded) - held_back)
        piece, self._shown = self._decoded[self._shown : end], end
        return piece

    def _looked_for(self) -> tuple[str, ...]:
        return self._stop if len(self._tokens) > self._min_tokens else ()

    def _held_back(self) -> int:
        """The length of the longest end of the text that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._looked_for()), default=0)
        for length in range(min(longest, len(self._decoded) - self._shown), 0, -1):
            end = self._decoded[-length:]
            at = bisect_left(self._stop, end)  # those that begin with it are the first that are not less
            if at < len(self._stop) and self._stop[at].startswith(end):
                return length
        return 0
