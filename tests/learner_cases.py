"""What the learner's tests share: a small model on disk, sequences, losses, and a plain padded torch loop to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bregman.data.packing import pack
from bregman.engines.config import AdamWConfig
from bregman.types import PackedBatch, Sequence

VOCABULARY = 29
LENGTHS = [9, 14, 5, 22, 17, 3, 11]
# eps well above rounding: at torch's default AdamW turns the rounding of a gradient near 0 into a visible step.
OPTIMIZER = AdamWConfig(learning_rate=1e-3, eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)


def make_model(folder: Path, *, tied: bool = True, layers: int = 2) -> Path:
    """A random Qwen3 with weights large enough that rounding is seen and signal is not lost."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": layers, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=tied))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


def make_moe(folder: Path) -> Path:
    """A random Qwen3-MoE whose three experts split unevenly over two ranks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **heads))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_sequences(lengths: list[int] = LENGTHS, *, seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [
        Sequence(
            token_ids=rng.integers(0, VOCABULARY, n),
            loss_mask=np.arange(n) >= max(n // 3, 1),
            advantage=float(rng.normal()),
            rollout_logprobs=rng.normal(-3.0, 0.1, n).astype(np.float32),
        )
        for n in lengths
    ]


def minibatch(*, token_budget: int = 1000, num_ranks: int = 1, seed: int = 0, lengths: list[int] = LENGTHS) -> list[PackedBatch]:
    return pack(make_sequences(lengths, seed=seed), token_budget=token_budget, normalizer=7.0, temperature=0.9, num_ranks=num_ranks)


def policy_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A sequence-level loss with a square, so that a sequence split in two or weighted wrongly would show."""
    assert batch.rollout_logprobs is not None
    ratios = torch.where(batch.loss_mask, logprobs - batch.rollout_logprobs, 0.0)
    sums = torch.stack([part.sum() for part in ratios.split(batch.boundaries.diff().tolist())])
    loss = (0.05 * sums.square() - batch.advantages * sums).sum() / batch.normalizer
    return loss, {"trained_tokens": batch.loss_mask.sum(), "log_ratio": sums.detach().sum()}


def reference_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`policy_loss`, reporting how far the policy is from its references."""
    loss, metrics = policy_loss(logprobs, batch)
    assert batch.reference_logprobs is not None
    metrics["from_reference"] = (logprobs - batch.reference_logprobs).detach().abs().sum()
    if batch.fixed_logprobs is not None:
        metrics["from_fixed"] = (logprobs - batch.fixed_logprobs).detach().abs().sum()
    return loss, metrics


def nan_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return logprobs.sum() * float("nan"), {}


def broken_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    raise ZeroDivisionError("a bug in the loss")


def padded_loop(folder: Path, steps: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """(loss, gradient norm) of each step and the final weights of a loop without packing, FSDP or our attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, foreach=False)
    trace = []
    for step in range(steps):
        loss = _padded_policy_loss(model, make_sequences(seed=step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trace.append((loss.item(), norm.item()))
    return trace, {name: parameter.detach() for name, parameter in model.named_parameters()}


def _padded_policy_loss(model: torch.nn.Module, sequences: list[Sequence]) -> torch.Tensor:
    width = max(len(sequence.token_ids) for sequence in sequences)

    def padded(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in rows]))

    ids = padded([s.token_ids for s in sequences])
    mask, rollout = padded([s.loss_mask for s in sequences])[:, 1:], padded([s.rollout_logprobs for s in sequences])[:, 1:]
    logits = model(input_ids=ids, attention_mask=padded([np.ones(len(s.token_ids)) for s in sequences]), use_cache=False).logits
    logprobs = log_softmax(logits[:, :-1] / 0.9, -1).gather(2, ids[:, 1:, None])[..., 0]
    sums = torch.where(mask, logprobs - rollout, 0.0).sum(1)
    advantages = torch.tensor([s.advantage for s in sequences])
    return (0.05 * sums.square() - advantages * sums).sum() / 7.0
