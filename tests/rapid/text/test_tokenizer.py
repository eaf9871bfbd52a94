"""Text comes out of a stream whole and once, and two tokenizers are the same or it is said how they differ."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rapid.errors import ModelFileError, ModelMismatch
from rapid.kernels.interface import BatchEntry
from rapid.models.model import Model
from rapid.text.tokenizer import Detokenizer, check_same_tokenizer, load_tokenizer

TEXTS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse.",
    "emoji 👩‍🚀👨‍👩‍👧‍👦 🇫🇷 🏴‍☠️ end",
    "中文没有空格，句子很长。日本語もあります。한국어도.",
    "combining e\u0301 a\u030a n\u0303, Ünïcödé, ﬁancée, हिन्दी, العربية",
    "def f(x):\n    return x**2  # π\r\n\n\tif x != 3.14159:\n\t\tprint(f'{x!r}')\n",
    "long" + " " * 70 + "white" + "\n" * 40 + "space" + "\t" * 20,
    "  leading and trailing  ",
    "a",
]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stream(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    """All that a stream returns, and whether it stopped; checks on the way that ``text`` is what was returned."""
    streaming, shown = Detokenizer(tokenizer, stop), ""
    for token in tokens:
        shown += streaming.push(token)
        assert streaming.text == shown
    shown += streaming.finish()
    assert streaming.text == shown
    assert streaming.finish() == ""
    return shown, streaming.stopped is not None


@pytest.mark.parametrize("text", TEXTS)
def test_token_by_token_equals_decoding_all(chat_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = encode(chat_tokenizer, text)
    assert stream(chat_tokenizer, tokens) == (text, False)
    assert stream(chat_tokenizer, tokens, ("never in there",)) == (text, False)


def test_any_tokens_at_all_stream_as_they_decode(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """A model may write halves of characters, never to be completed, and special tokens anywhere."""
    rng = random.Random(1)
    for _ in range(50):
        tokens = [rng.randrange(len(chat_tokenizer)) for _ in range(30)] + rng.choices(range(3), k=3)
        rng.shuffle(tokens)
        shown, _ = stream(chat_tokenizer, tokens)
        # A character that the end cuts off is left out.
        assert shown == chat_tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_half_a_character_is_never_shown(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode(chat_tokenizer, "👩‍🚀 中文 🏴‍☠️")
    streaming = Detokenizer(chat_tokenizer)
    assert not any("\ufffd" in streaming.push(token) for token in tokens)
    cut = Detokenizer(chat_tokenizer)
    assert cut.push(tokens[0]) == ""
    assert cut.finish() == ""
    own = Detokenizer(chat_tokenizer)  # the replacement character itself is a character
    assert "".join(own.push(token) for token in encode(chat_tokenizer, "a\ufffd")) + own.finish() == "a\ufffd"


def test_nothing_of_a_stop_string_and_nothing_behind_it_is_shown(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop strings cut at random from the text cross token borders; the first that is complete ends the output."""
    rng = random.Random(2)
    for text in TEXTS:
        tokens = encode(chat_tokenizer, text)
        so_far = [chat_tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
        for _ in range(40):
            stops = []
            for _ in range(rng.randint(1, 3)):
                start = rng.randrange(len(text))
                stops.append(text[start : start + rng.randint(1, 12)])
            met = next(part for part in so_far if any(stop in part for stop in stops))
            expected = text[: min(met.index(stop) for stop in stops if stop in met)]
            assert stream(chat_tokenizer, tokens, tuple(stops)) == (expected, True)


def test_text_that_only_began_like_a_stop_string_is_released(letter_tokenizer: Callable[..., object]) -> None:
    """It is held back while it may become one, shown as soon as it cannot, and at the end of the text."""
    tokenizer = letter_tokenizer(8)
    streaming = Detokenizer(tokenizer, ("abc", "bd"))
    shown = [streaming.push(token) for token in encode(tokenizer, "abaabb")]
    assert shown == ["", "", "ab", "a", "", "ab"]
    assert streaming.finish() == "b"
    assert not streaming.stopped


def test_what_is_held_back_is_found_without_reading_all_stop_strings(letter_tokenizer: Callable[..., object]) -> None:
    """Else a text that parts late from many long stop strings would stop all streams of its process for seconds."""
    compared = 0

    class Counted(str):
        def startswith(self, *args: Any) -> bool:
            nonlocal compared
            compared += 1
            return str.startswith(self, *args)

    rng, tokenizer = random.Random(3), letter_tokenizer(8)
    text = "".join(rng.choices("abcde", k=400))
    stops = tuple(Counted(f"{text[:300]}h{i}") for i in range(64))
    streaming = Detokenizer(tokenizer, stops)
    shown = [streaming.push(token) for token in encode(tokenizer, text)]
    assert not any(shown[:300]) and "".join(shown) == text
    assert compared <= 300 + len(text)  # with each end of the text at most one is


def test_a_stopped_stream_stays_stopped(letter_tokenizer: Callable[..., object]) -> None:
    """Tokens of the same round that lie behind the stop string are not shown."""
    tokenizer = letter_tokenizer(8)
    streaming = Detokenizer(tokenizer, ("bc",))
    assert "".join(streaming.push(token) for token in encode(tokenizer, "aabcddd")) == "aa"
    assert streaming.stopped
    assert streaming.finish() == ""
    assert streaming.text == "aa"


def test_a_character_that_is_cut_off_completes_no_stop_string(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    first_byte = encode(chat_tokenizer, "👩")[0]
    assert stream(chat_tokenizer, [*encode(chat_tokenizer, "ab"), first_byte], ("b\ufffd",)) == ("ab", False)


def test_the_stop_string_is_named(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    streaming = Detokenizer(chat_tokenizer, ("zz", "ma", "Ishmael"))
    for token in encode(chat_tokenizer, "Call me Ishmael."):
        streaming.push(token)
    assert (streaming.stopped, streaming.text) == ("Ishmael", "Call me ")


Edit = Callable[[dict[str, object]], None]


@pytest.fixture
def edited(smollm: Path) -> Callable[[Edit], PreTrainedTokenizerFast]:
    """The real tokenizer after a change to its tokenizer.json."""

    def make(edit: Edit, **special: str) -> PreTrainedTokenizerFast:
        state = json.loads((smollm / "tokenizer.json").read_text())
        edit(state)
        tokenizer = Tokenizer.from_str(json.dumps(state))
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **special}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    return make


def unchanged(state: dict[str, object]) -> None:
    pass


def test_the_same_tokenizer_is_accepted(
    chat_tokenizer: PreTrainedTokenizerFast, smollm: Path, edited: Callable[..., PreTrainedTokenizerFast]
) -> None:
    check_same_tokenizer(chat_tokenizer, chat_tokenizer)
    check_same_tokenizer(chat_tokenizer, load_tokenizer(str(smollm)))
    check_same_tokenizer(chat_tokenizer, edited(unchanged))


def test_an_added_token_is_named(
    chat_tokenizer: PreTrainedTokenizerFast, edited: Callable[..., PreTrainedTokenizerFast]
) -> None:
    larger = edited(unchanged)
    larger.add_tokens([AddedToken("<|think|>", special=True)])
    with pytest.raises(ModelMismatch, match=r"49,152 .* 49,153 .*'<\|think\|>' is only in the drafter"):
        check_same_tokenizer(chat_tokenizer, larger)
    with pytest.raises(ModelMismatch, match=r"49,153 .* 49,152 .*'<\|think\|>' is only in the target"):
        check_same_tokenizer(larger, chat_tokenizer)


def test_a_moved_token_is_named(
    chat_tokenizer: PreTrainedTokenizerFast, edited: Callable[..., PreTrainedTokenizerFast]
) -> None:
    def swap(state: dict[str, object]) -> None:
        vocabulary = state["model"]["vocab"]  # type: ignore[index]
        vocabulary["hello"], vocabulary["world"] = vocabulary["world"], vocabulary["hello"]

    ids = {chat_tokenizer.convert_tokens_to_ids(word): word for word in ("hello", "world")}
    first, second = sorted(ids)
    expected = f"the token '{ids[first]}' has id {first} in the target and {second} in the drafter"
    with pytest.raises(ModelMismatch, match=expected):
        check_same_tokenizer(chat_tokenizer, edited(swap))


def test_another_end_of_sequence_is_named(
    chat_tokenizer: PreTrainedTokenizerFast, edited: Callable[..., PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(ModelMismatch, match=r"eos_token is '<\|im_end\|>' in the target and '<\|endoftext\|>'"):
        check_same_tokenizer(chat_tokenizer, edited(unchanged, eos_token="<|endoftext|>"))


def test_another_way_of_splitting_is_shown(
    chat_tokenizer: PreTrainedTokenizerFast, edited: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """The same vocabulary can still split text otherwise: other merges, digits, or normalisation."""

    def without_merges(state: dict[str, object]) -> None:
        state["model"]["merges"] = []  # type: ignore[index]

    with pytest.raises(ModelMismatch, match='they split "The 3 quick'):
        check_same_tokenizer(chat_tokenizer, edited(without_merges))
    composing = edited(unchanged)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ModelMismatch, match="they split 'Ünïcödé"):
        check_same_tokenizer(chat_tokenizer, composing)


def test_a_padded_checkpoint_never_writes_beyond_the_tokenizer(
    tiny_network: Callable[..., PreTrainedModel], letter_tokenizer: Callable[[int], PreTrainedTokenizerFast]
) -> None:
    """Checkpoints pad their output to round numbers; ``vocab_size`` and the logits are the tokenizer's."""
    network = tiny_network(32)
    model = Model(network, letter_tokenizer(7), "padded")
    assert model.vocab_size == model.info.vocab_size == 7
    assert network.config.vocab_size == 32
    cache = model.new_pool(2**12).open([], 4)
    assert cache is not None
    assert model.forward([BatchEntry(cache, [1, 2, 3], 2)])[0].shape == (2, 7)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_readable_tokenizer_is_a_model_file_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFileError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))
