"""Verification over the tokens that p or q allow: the law of every rule, and the same decisions as over all tokens."""

import numpy as np
import pytest
import torch
from test_distributions import assert_follows

from benchmarks.common.closed_forms import law
from rapid.engine import verdicts
from rapid.engine.verdicts import How, Verify
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft
from rapid.speculation.verification import RULES, verify

VOCAB, NUM, ETA = 200, 4000, 6.0
SAMPLING = SamplingParams(temperature=0.8, top_p=0.7)
LOGITS = 2 * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))


def wishes(rule: str) -> tuple[list[Verify], np.ndarray]:
    """One round of many seeds, each with a draft token of its own from q; and q [V]. Half of q's tokens have no p."""
    p = probabilities(LOGITS[0], SAMPLING)
    ids = torch.cat([p.topk(6).indices, p.argsort()[:6]]).numpy()
    weights = np.linspace(1, 2, 12, dtype=np.float32) / 18
    drawn = np.random.default_rng(2).choice(ids, NUM, p=weights.astype(np.float64) / weights.sum(dtype=np.float64))
    drafts = [Draft(0, [int(token)], [(ids, weights)], [0.5]) for token in drawn]
    found = [
        Verify(LOGITS, draft, How(SAMPLING, seed, draft.distributions, False, RULES[rule], ETA))
        for seed, draft in enumerate(drafts)
    ]
    q = np.zeros(VOCAB)
    q[ids] = weights
    return found, q


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
