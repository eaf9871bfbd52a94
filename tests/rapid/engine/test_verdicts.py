"""Verification over the tokens that p or q allow: the law of every rule, and the same decisions as over all tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from test_distributions import assert_follows

from benchmarks.common.closed_forms import law
from rapid.engine import verdicts
from rapid.engine.verdicts import Bound, How, Verify
from rapid.kernels.cpu.jit import available
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft
from rapid.speculation.verification import RULES, verify

VOCAB, NUM, ETA = 208, 4000, 6.0
SAMPLING = SamplingParams(temperature=0.8, top_p=0.7)
LOGITS = 2 * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["few", "possible"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows of few tokens come from a kernel, if there is one, and all others from the whole distribution."""
    if request.param == "possible":
        monkeypatch.setattr(verdicts, "warp_to_few", lambda *_: None)
    elif available():
        monkeypatch.setattr(verdicts, "warp", None)
    return str(request.param)


def wishes(rule: str) -> tuple[list[Verify], np.ndarray]:
    """One round of many seeds, each with a draft token of its own from q; and q [V]. Half of q's tokens have no p."""
    p = probabilities(LOGITS[0], SAMPLING)
    ids = torch.cat([p.topk(6).indices, p.argsort()[:6]]).numpy()
    weights = np.linspace(1, 2, 12, dtype=np.float32) / 18
    drawn = np.random.default_rng(2).choice(ids, NUM, p=weights.astype(np.float64) / weights.sum(dtype=np.float64))
    drafts = [Draft(0, [int(token)], [(ids, weights)], [0.5]) for token in drawn]
    found = [
        Verify(LOGITS, draft, How(SAMPLING, seed, draft.distributions, RULES[rule], ETA))
        for seed, draft in enumerate(drafts)
    ]
    q = np.zeros(VOCAB)
    q[ids] = weights
    return found, q


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", RULES)
def test_what_is_possible_follows_the_rule_s_law(rule: str) -> None:
    asked, q = wishes(rule)
    p = probabilities(LOGITS, SAMPLING).double().numpy()
    assert (p > 0).sum(-1).max() < 50
    counts = np.zeros((2, VOCAB))
    for wish, values in zip(asked, Verify.together(asked), strict=True):
        num_accepted, token = map(int, values)
        first = wish.draft.tokens[0] if num_accepted else token
        counts[0, first] += 1
        if num_accepted:
            counts[1, token] += 1
    with np.errstate(divide="ignore"):
        expected = law(rule, SAMPLING.temperature * np.log(p[0]), q / q.sum(), ETA, SAMPLING.temperature)
    assert_follows(counts[0], expected)
    assert_follows(counts[1], p[1] / p[1].sum())


@pytest.mark.parametrize("rule", RULES)
def test_the_same_tokens_are_accepted_as_over_the_whole_vocabulary(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = wishes(rule)
    possible = [int(values[0]) for values in Verify.together(asked)]
    monkeypatch.setattr(verdicts, "_verify_possible", verify)
    whole = [int(values[0]) for values in Verify.together(asked)]
    assert possible == whole and 0 < sum(whole) < NUM


@pytest.mark.parametrize("asked", [{}, {"num_logprobs": 3}, {"strength": Bound(0.5, 0.8, 0.9)}, {"is_plain": True}])
def test_one_verification_is_the_same_by_few_tokens(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else it is asked for; its draft token is one of the q's many."""
    is_plain = asked.pop("is_plain", False)
    alone = []
    for wish in wishes("augmented")[0][:60]:
        logits, draft = (LOGITS[:1], Draft(0)) if is_plain else (wish.logits, wish.draft)
        how = wish.how._replace(distributions=draft.distributions, **asked)
        alone.append(Verify(logits, draft, how))
    few = [Verify.together([wish])[0] for wish in alone]
    monkeypatch.setattr(verdicts, "warp_to_few", lambda *_: None)
    for wish, values in zip(alone, few, strict=True):
        (expected,) = Verify.together([wish])
        torch.testing.assert_close(values, expected)
