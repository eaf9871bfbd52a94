"""Output that follows a grammar: no draft breaks it, a rejected one leaves no trace, and its law is the masked one."""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from running import GREEDY, logits_after
from test_distributions import assert_follows, many
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from world import World, complete, run

from rapid.engine import verify as tasks
from rapid.engine.engine import Engine
from rapid.errors import InvalidRequest
from rapid.models.model import Model
from rapid.sampling.grammar import Framed, Grammar, json_grammar, json_in_text
from rapid.sampling.logits_processor import LogitProcessor
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft, certain_draft

END = 256
STRATEGIES = [
    ("autoregressive", 0),
    ("lookup", 4),
    *((strategy, 3) for strategy in ("speculative", "magicdec", "triforce")),
    ("rapid", 3),
    ("rapid", "auto"),
]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 5},
        "b": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
        "c": {"enum": ["yes", "no"]},
    },
    "required": ["a", "c"],
    "additionalProperties": False,
}


def tokens_of(text: str) -> list[int]:
    return [_IDS[character] for character in text]


_ALPHABET = sorted(ByteLevel.alphabet())
_IDS = {character: i for i, character in enumerate(_ALPHABET)} | {" ": _ALPHABET.index("Ġ"), "\n": _ALPHABET.index("Ċ")}


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end of sequence."""
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate(_ALPHABET)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture
def world(
    tiny_network: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    engine: Callable[..., Engine],
) -> World:
    """A target and a drafter that disagree, and write any bytes."""
    networks = (tiny_network(257, seed=seed, layers=1, eos=END) for seed in (1, 2))
    engines = [engine(Model(network, byte_tokenizer, "bytes")) for network in networks]
    return World(*engines, byte_tokenizer)


PROMPT = 'Write {"a": "xy", "b": [1, 2], "c": "no"} or so. {"a": "broken\n\nJSON, please'


def asking(world: World, schema: dict[str, Any], **how: Any) -> Any:
    params = LogitParams(grammar=json_grammar(Framed(schema)))
    return world.request(prompt=world.prompt(PROMPT), max_tokens=300, logits=params, **how)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Watches that every token the drafter draws is one that the grammar allows; counts them by round."""
    seen: list[int] = []

    def watched(draft: Draft, num_allowed: int) -> Draft:
        sampled = any(len(ids) > 1 for ids, _ in draft.distributions)
        assert num_allowed == len(draft.tokens) or not sampled
        seen.append(len(draft.tokens))
        return within(draft, num_allowed)

    within = tasks.within_grammar
    monkeypatch.setattr(tasks, "within_grammar", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
def test_what_is_written_is_valid(
    world: World, drafts: list[int], strategy: str, gamma: int | str, overlap: bool, temperature: float
) -> None:
    """A model of random weights, which would otherwise write noise."""
    for seed in range(3):
        sampling = SamplingParams(temperature=temperature, seed=None if overlap else seed)
        completion = run(asking(world, SCHEMA, strategy=strategy, gamma=gamma, sampling=sampling),
                         world.backend(overlap=overlap))  # fmt: skip
        jsonschema.validate(json.loads(completion.text), SCHEMA)
        assert completion.finish.reason == "stop"
    assert sum(drafts) > 0 or strategy == "autoregressive" or gamma == "auto"


@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
def test_greedy_text_is_the_argmax_of_what_the_grammar_allows(world: World, strategy: str, gamma: int | str) -> None:
    request = asking(world, SCHEMA, strategy=strategy, gamma=gamma)
    matcher = Grammar(request.logits.grammar, world.tokenizer, 257, [END])
    output: list[int] = []
    while output[-1:] != [END]:
        logits = logits_after(world.target.model, request.prompt.tokens + output)
        output.append(int(logits.masked_fill(~torch.from_numpy(matcher.allowed(output)), -torch.inf).argmax()))
    assert run(request, world.backend()).tokens == output


@pytest.mark.parametrize("strategy", ["speculative", "lookup"])
def test_a_grammar_s_law_is_the_masked_one(world: World, strategy: str) -> None:
    """Two digits of three: each is drawn from p without the others, and the drafts, of whatever q, do not show."""
    sampling = SamplingParams(temperature=1.0)
    request = asking(world, {"type": "string", "pattern": "^[123][13]$"}, strategy=strategy, gamma=3, sampling=sampling)
    quote = tokens_of('"')
    exact = np.zeros((257, 257))
    first = probabilities(_only(world, request, quote, "123"), sampling)
    for token in tokens_of("123"):
        second = probabilities(_only(world, request, [*quote, token], "13"), sampling)
        exact[token] = (float(first[token]) * second).numpy()

    counts = many(world, replace(request, max_tokens=4), 400, 3)[quote[0]]
    assert_follows(counts.ravel(), exact.ravel())


def _only(world: World, request: Any, output: list[int], allowed: str) -> torch.Tensor:
    logits = logits_after(world.target.model, request.prompt.tokens + output)
    mask = torch.ones(257, dtype=torch.bool)
    mask[tokens_of(allowed)] = False
    return logits.masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
def test_json_that_opens_within_a_text_ends_as_its_schema_says(
    world: World, drafts: list[int], strategy: str, gamma: int | str, several: bool
) -> None:
    grammar = json_in_text(Framed(SCHEMA, "<", ">"), opening="<", several=several, param="tools")
    bias = {token: -100.0 for token in set(range(256)) - set(tokens_of("<>")) - set(tokens_of(PROMPT))}
    params = LogitParams(grammar=grammar, logit_bias=bias | {tokens_of("<")[0]: 2.0, END: -5.0})
    sampling = SamplingParams(temperature=1.0, seed=1)
    request = world.request(prompt=world.prompt(PROMPT), max_tokens=300, strategy=strategy, gamma=gamma,
                            logits=params, sampling=sampling)  # fmt: skip
    rest, found = run(request, world.backend()).text, 0
    while "<" in rest and "}>" in rest:  # max_tokens may have cut the last
        rest = rest.partition("<")[2]
        value, end = json.JSONDecoder().raw_decode(rest)
        jsonschema.validate(value, SCHEMA)
        assert rest[end] == ">"
        rest, found = rest[end + 1 :], found + 1
    assert found > 1 if several else found == 1 and "<" not in rest
    assert sum(drafts) > 0 or strategy == "autoregressive" or gamma == "auto"


def test_a_rejected_draft_leaves_no_trace(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """What may follow an output is the same by whatever way the matcher came to it."""
    grammar = json_grammar(Framed(SCHEMA))
    outputs = ['{"a": "x', '{"a": "xyz", "c": "n', '{"a": "xyz", "b": [1', "", '{"a": "", "c": "no"}', '{"a": "q']
    fresh = {text: Grammar(grammar, byte_tokenizer, 257, [END]).allowed(tokens_of(text)) for text in outputs}
    wandering = Grammar(grammar, byte_tokenizer, 257, [END])
    for here, there in itertools.product(outputs, repeat=2):
        for text in (here, there):
            assert np.array_equal(wandering.allowed(tokens_of(text)), fresh[text])
    whole = tokens_of('{"a": "", "c": "no"}')
    assert np.flatnonzero(wandering.allowed(whole)).tolist() == [END]
    assert wandering.num_allowed(whole[:-3], [*whole[-3:], END, 5, 6]) == 4
    assert wandering.num_allowed(whole, tokens_of("}")) == 0
    assert np.array_equal(wandering.allowed([*whole, END])[:END], fresh['{"a": "", "c": "no"}'][:END])
    assert np.array_equal(wandering.allowed(whole[:8]), Grammar(grammar, byte_tokenizer, 257, [END]).allowed(whole[:8]))


def test_a_looked_up_draft_ends_where_it_breaks_the_grammar(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    draft = certain_draft(0, tokens_of('{"a": 7'))
    params = LogitParams(grammar=json_grammar(Framed(SCHEMA)), eos=(END,))
    processor = LogitProcessor(params, byte_tokenizer, 257, torch.device("cpu"))
    num_allowed = processor.num_allowed([], draft.tokens)
    assert num_allowed == 6
    assert tasks.within_grammar(draft, num_allowed).tokens == draft.tokens[:6]
    drawn = replace(draft, distributions=[(np.array([1, 2], np.int32), np.ones(2, np.float32) / 2)] * 7)
    with pytest.raises(ValueError, match="breaks the grammar"):
        tasks.within_grammar(drawn, num_allowed)


def test_a_schema_that_cannot_be_enforced_is_refused() -> None:
    for schema in ({"type": "nothing"}, {"type": "array", "uniqueItems": True}, {"$ref": "#/nowhere"}):
        with pytest.raises(InvalidRequest, match="cannot be enforced") as caught:
            json_grammar(Framed(schema))
        assert caught.value.param == "response_format"


def test_a_model_without_an_end_of_sequence_is_told(tiny_network: Any, byte_tokenizer: Any, engine: Any) -> None:
    lone = engine(Model(tiny_network(257, layers=1), byte_tokenizer, "endless"))
    world = World(lone, lone, byte_tokenizer)
    with pytest.raises(InvalidRequest, match="no end of sequence"):
        run(asking(world, SCHEMA), world.backend())


def test_penalties_and_a_grammar_together(world: World) -> None:
    request = asking(world, SCHEMA, sampling=GREEDY)
    biased = replace(request.logits, logit_bias=dict.fromkeys(tokens_of('"'), -100.0), frequency_penalty=2.0)
    completion = asyncio.run(complete(replace(request, logits=biased), world.backend()))
    jsonschema.validate(json.loads(completion.text), SCHEMA)
