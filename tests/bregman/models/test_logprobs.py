"""Blocked log-probabilities against float64: values, gradients, temperature, what is skipped, and the memory they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bregman.models import logprobs as logprobs_module
from bregman.models.logprobs import aligned, next_token_logprobs, token_logprobs

TOKENS, WIDTH, VOCABULARY = 37, 16, 101


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", 0)
    monkeypatch.setattr(logprobs_module, "CPU_BLOCK", (10, 13))


def case(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    hidden = (3 * torch.randn(TOKENS, WIDTH)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[:2] = torch.tensor([0, VOCABULARY - 1])  # the ends of the vocabulary
    return hidden, head, targets, torch.randn(TOKENS)


def exact(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, upstream: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parameters = [tensor.detach().double().requires_grad_() for tensor in (hidden, *head.parameters())]
    logits = nn.functional.linear(*parameters) / temperature
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), list(torch.autograd.grad((logprobs * upstream.double()).sum(), parameters))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_equals_float64(dtype: torch.dtype, tolerance: float, bias: bool, temperature: float) -> None:
    hidden, head, targets, upstream = case(dtype, bias=bias)
    expected, gradients = exact(hidden, head, targets, upstream, temperature)
    found = next_token_logprobs(hidden, head, targets, temperature)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 5 * tolerance
    (found * upstream).sum().backward()
    for tensor, gradient in zip((hidden, *head.parameters()), gradients, strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == dtype
        assert (tensor.grad - gradient).abs().max() < tolerance * gradient.abs().max()


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    hidden, head, targets, upstream = case()
    hidden = (hidden.detach() * 1000).requires_grad_()
    expected, gradients = exact(hidden, head, targets, upstream, 1.0)
    found = next_token_logprobs(hidden, head, targets)
    found.backward(upstream)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [slice(0, 0), slice(5, 6), slice(20, 37)])
def test_tokens_without_gradient_are_skipped(kept: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, upstream = case()
    masked = torch.zeros_like(upstream)
    masked[kept] = upstream[kept]
    _, gradients = exact(hidden, head, targets, masked, 1.0)
    found = next_token_logprobs(hidden, head, targets)
    rows: list[int] = []
    original = logprobs_module._logits
    monkeypatch.setattr(logprobs_module, "_logits", lambda states, *rest: rows.append(len(states)) or original(states, *rest))
    found.backward(masked)
    assert hidden.grad is not None and head.weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), gradients[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), gradients[1], rtol=1e-5, atol=1e-6)
    assert sum(rows) == (kept.stop - kept.start) * -(-VOCABULARY // 13)


def test_a_frozen_head_or_body_gets_no_gradient() -> None:
    for frozen in ("hidden", "head"):
        hidden, head, targets, upstream = case()
        (hidden if frozen == "hidden" else head.weight).requires_grad_(False)
        next_token_logprobs(hidden, head, targets).backward(upstream)
        assert (hidden.grad is None) is (frozen == "hidden")
        assert (head.weight.grad is None) is (frozen == "head")


def test_never_more_logits_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, upstream = case()
    sizes: list[int] = []
    original = logprobs_module._logits

    def spy(states: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
        sizes.append(len(states) * len(weight))
        return original(states, weight, temperature)

    monkeypatch.setattr(logprobs_module, "_logits", spy)
    next_token_logprobs(hidden, head, targets).backward(upstream)
    assert max(sizes) == 10 * 13
    assert sum(sizes) == 2 * TOKENS * VOCABULARY  # once forward, once backward


def test_alignment() -> None:
    boundaries = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    torch.testing.assert_close(aligned(torch.arange(1.0, 7.0), boundaries), torch.tensor([0.0, 1.0, 0.0, 0.0, 4.0, 5.0]))
    uniform = token_logprobs(torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64), boundaries)
    torch.testing.assert_close(uniform, -torch.tensor(4.0).log() * torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
