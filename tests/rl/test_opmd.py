"""The loss against the paper: Eq. (3) in float64, its other form, the tabular bandit, and what must not change it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bregman.types import PackedBatch
from rl.algorithms import build_algorithm
from rl.config import GRPOConfig, OPMDConfig, ReSTConfig
from rl.grpo import grpo_advantages, grpo_loss
from rl.kl import kl_penalty
from rl.opmd import opmd_advantages, opmd_loss, opmd_token_loss, sequence_sums
from rl.rest import rest_advantages, rest_loss

LENGTHS = (5, 3, 7, 4)
ADVANTAGES = (0.75, -0.25, -0.25, -0.25)


@pytest.fixture
def pack():
    """Log-probabilities [T] as a function of parameters, with a prompt token at the front of every sequence."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    loss_mask = torch.ones(total, dtype=torch.bool)
    loss_mask[boundaries[:-1]] = False
    features = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    reference = -torch.rand(total, generator=generator, dtype=torch.float64)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    return features, reference, advantages, loss_mask, boundaries


def _logprobs(theta, features):
    return torch.nn.functional.logsigmoid(features @ theta)


def _gradient(loss, theta):
    return torch.autograd.grad(loss, theta, retain_graph=True)[0]


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
def test_gradient_is_minus_equation_3(pack, tau):
    features, reference, advantages, mask, boundaries = pack
    theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    loss = opmd_loss(_logprobs(theta, features), reference, advantages, mask, boundaries, tau=tau, normalizer=4)

    ascent = torch.zeros(6, dtype=torch.float64)
    for j, (start, end) in enumerate(pairwise(boundaries.tolist())):
        tokens = torch.arange(start + 1, end)
        log_pi = _logprobs(theta, features)[tokens].sum()
        squared = (_logprobs(theta, features)[tokens].sum() - reference[tokens].sum()) ** 2
        ascent += _gradient(log_pi, theta) * advantages[j] - tau / 2 * _gradient(squared, theta)

    torch.testing.assert_close(_gradient(loss, theta), -ascent / 4, rtol=1e-12, atol=1e-14)


def test_squared_form_has_the_same_gradient(pack):
    features, reference, advantages, mask, boundaries = pack
    tau = 0.1
    theta = torch.full((6,), -0.2, dtype=torch.float64, requires_grad=True)
    loss = opmd_loss(_logprobs(theta, features), reference, advantages, mask, boundaries, tau=tau, normalizer=4)
    log_ratio = sequence_sums(torch.where(mask, _logprobs(theta, features) - reference, 0.0), boundaries)
    squared = ((tau * log_ratio - advantages) ** 2 / (2 * tau)).sum() / 4
    torch.testing.assert_close(_gradient(loss, theta), _gradient(squared, theta), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_tabular_bandit_converges_to_the_closed_form(tau):
    """Minimising the surrogate with tau log Z as baseline gives exactly pi_i exp(r / tau) / Z."""
    reward = torch.tensor([1.0, 0.0, 0.5, -0.3], dtype=torch.float64)
    log_pi_i = torch.log_softmax(torch.tensor([0.1, 0.7, -0.4, 0.0], dtype=torch.float64), 0)
    tau_log_z = tau * torch.logsumexp(log_pi_i + reward / tau, 0)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        log_pi = torch.log_softmax(theta, 0)
        # One-token sequences, each arm once; weighting an arm by pi_i takes the expectation under the sampler.
        parts = [
            log_pi_i[a].exp()
            * opmd_loss(
                log_pi[a : a + 1],
                log_pi_i[a : a + 1],
                (reward[a] - tau_log_z)[None],
                torch.tensor([True]),
                torch.tensor([0, 1]),
                tau=tau,
                normalizer=1,
            )
            for a in range(4)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = torch.softmax(log_pi_i + reward / tau, 0)
    torch.testing.assert_close(torch.softmax(theta.detach(), 0), optimum, rtol=1e-6, atol=1e-8)


def test_tau_does_nothing_at_the_first_step(pack):
    features, _, advantages, mask, boundaries = pack
    theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    reference = _logprobs(theta, features).detach()
    gradients = [
        _gradient(opmd_loss(_logprobs(theta, features), reference, advantages, mask, boundaries, tau=tau, normalizer=4), theta)
        for tau in (0.0, 5.0)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_prompt_tokens_do_not_matter(pack):
    features, reference, advantages, mask, boundaries = pack
    theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    disturbed = torch.where(mask, reference, reference + 3.0)
    losses = [opmd_loss(_logprobs(theta, features), r, advantages, mask, boundaries, tau=0.5, normalizer=4) for r in (reference, disturbed)]
    assert losses[0].item() == losses[1].item()


def test_splitting_a_pack_changes_neither_loss_nor_gradient(pack):
    features, reference, advantages, mask, boundaries = pack
    theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    whole = opmd_loss(_logprobs(theta, features), reference, advantages, mask, boundaries, tau=0.5, normalizer=4)
    cut = int(boundaries[2])
    parts = [
        opmd_loss(
            _logprobs(theta, features[a:b]),
            reference[a:b],
            advantages[c:d],
            mask[a:b],
            boundaries[c : d + 1] - boundaries[c],
            tau=0.5,
            normalizer=4,
        )
        for a, b, c, d in ((0, cut, 0, 2), (cut, sum(LENGTHS), 2, 4))
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=0)
    torch.testing.assert_close(_gradient(whole, theta), _gradient(sum(parts), theta), rtol=1e-12, atol=1e-15)


def test_token_level_drops_the_cross_terms():
    """Two tokens with log-ratios 1 and -1: S = 0 for the sequence, but each token's own square counts."""
    logprobs, reference = torch.tensor([0.0, -1.0, -3.0]), torch.tensor([0.0, -2.0, -2.0])
    arguments = (logprobs, reference, torch.tensor([0.0]), torch.tensor([False, True, True]), torch.tensor([0, 3]))
    assert opmd_loss(*arguments, tau=1.0, normalizer=1).item() == 0.0
    assert opmd_token_loss(*arguments, tau=1.0, normalizer=1).item() == 1.0


class TestAdvantages:
    def test_mean(self):
        assert opmd_advantages([1.0, 0.0, 0.0, 0.0], baseline="mean", tau=0.1) == [0.75, -0.25, -0.25, -0.25]

    @pytest.mark.parametrize("baseline", ["mean", "logavgexp"])
    def test_equal_rewards_have_no_signal(self, baseline):
        assert opmd_advantages([0.1] * 7, baseline=baseline, tau=0.1) == [0.0] * 7

    def test_logavgexp_by_hand(self):
        expected = 0.1 * math.log((3 * math.exp(10) + 5) / 8)
        values = opmd_advantages([1.0] * 3 + [0.0] * 5, baseline="logavgexp", tau=0.1)
        assert values[0] == pytest.approx(1 - expected)
        assert values[-1] == pytest.approx(-expected)
        assert expected == pytest.approx(0.902, abs=1e-3)

    def test_logavgexp_tends_to_the_mean_for_large_tau(self):
        assert opmd_advantages([1.0, 0.0, 0.5], baseline="logavgexp", tau=1e6) == pytest.approx([0.5, -0.5, 0.0], abs=1e-6)

    def test_logavgexp_does_not_overflow(self):
        assert all(math.isfinite(a) for a in opmd_advantages([1.0, 0.0], baseline="logavgexp", tau=1e-4))


class TestOtherAlgorithms:
    def test_grpo_at_the_start_is_the_policy_gradient(self, pack):
        features, _, advantages, mask, boundaries = pack
        theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
        logprobs = _logprobs(theta, features)
        loss = grpo_loss(logprobs, logprobs.detach(), advantages, mask, boundaries, clip=0.2, normalizer=4)
        weights = torch.repeat_interleave(advantages / (torch.tensor(LENGTHS) - 1), torch.tensor(LENGTHS))
        expected = -(torch.where(mask, weights * logprobs, 0.0)).sum() / 4
        torch.testing.assert_close(_gradient(loss, theta), _gradient(expected, theta), rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize(
        ("advantage", "shift", "moves"), [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False)]
    )
    def test_grpo_clips_on_the_far_side_only(self, advantage, shift, moves):
        logprobs = torch.tensor([0.0, -1.0 + shift], requires_grad=True)
        loss = grpo_loss(
            logprobs,
            torch.tensor([0.0, -1.0]),
            torch.tensor([advantage]),
            torch.tensor([False, True]),
            torch.tensor([0, 2]),
            clip=0.2,
            normalizer=1,
        )
        loss.backward()
        assert bool(logprobs.grad[1] != 0) == moves

    def test_grpo_advantages_match_trl(self):
        values = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
        expected = (values - values.mean()) / (values.std() + 1e-4)
        assert grpo_advantages(values.tolist(), scale=True) == pytest.approx(expected.tolist(), rel=1e-6)
        assert grpo_advantages([1.0, 0.0], scale=False) == pytest.approx([0.5, -0.5])
        assert grpo_advantages([1.0, 1.0], scale=True) == [0.0, 0.0]

    def test_rest_learns_from_right_answers_only(self, pack):
        features, _, _, mask, boundaries = pack
        theta = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
        weights = torch.tensor(rest_advantages([1.0, 0.0, 0.4, 1.0]), dtype=torch.float64)
        assert weights.tolist() == [1.0, 0.0, 0.0, 1.0]
        logprobs = _logprobs(theta, features)
        loss = rest_loss(logprobs, weights, mask, boundaries, normalizer=4)
        right = [*range(1, 5), *range(16, 19)]
        torch.testing.assert_close(_gradient(loss, theta), _gradient(-logprobs[right].sum() / 4, theta), rtol=1e-12, atol=1e-15)

    def test_kl_penalty_is_zero_at_the_reference_and_positive_elsewhere(self):
        mask = torch.tensor([False, True, True])
        fixed = torch.tensor([-1.0, -2.0, -0.5])
        assert kl_penalty(fixed, fixed, mask, normalizer=1).item() == 0.0
        assert kl_penalty(fixed + 0.3, fixed, mask, normalizer=1).item() > 0.0
        shift = torch.tensor([5.0, 0.0, 0.0])
        assert kl_penalty(fixed + shift, fixed, mask, normalizer=1).item() == 0.0


@pytest.mark.parametrize("config", [OPMDConfig(), OPMDConfig(level="token"), OPMDConfig(baseline="logavgexp"), GRPOConfig(), ReSTConfig()])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_every_algorithm_runs_on_a_packed_batch(config, kl):
    import pickle

    total = sum(LENGTHS)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    mask = torch.ones(total, dtype=torch.bool)
    mask[boundaries[:-1].long()] = False
    batch = PackedBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        position_ids=torch.zeros(total, dtype=torch.int64),
        boundaries=boundaries,
        loss_mask=mask,
        advantages=torch.tensor(ADVANTAGES),
        sequence_index=torch.arange(4),
        normalizer=4.0,
        reference_logprobs=torch.full((total,), -1.0),
        fixed_logprobs=torch.full((total,), -1.1),
    )
    loss, advantages = build_algorithm(config, kl)
    loss = pickle.loads(pickle.dumps(loss))  # it travels to the learner's processes
    logprobs = torch.full((total,), -1.05, requires_grad=True)
    value, metrics = loss(logprobs, replace(batch))
    value.backward()
    assert logprobs.grad.abs().sum() > 0
    assert (logprobs.grad[~mask] == 0).all()
    assert metrics["policy/log_ratio_abs"] > 0
    assert ("policy/kl_fixed" in metrics) == (kl > 0)
    assert len(advantages([1.0, 0.0])) == 2
