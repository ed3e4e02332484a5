"""One rank of a context-parallel learner in a process of its own, for `test_context_parallel`."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from learner_cases import OPTIMIZER, make_sequences
from transformers import AutoModelForCausalLM, DeepseekV3Config, MistralConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from bregman.data.packing import pack
from bregman.engines import sharding
from bregman.engines.config import LearnerConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.engines.sharding import ShardedPolicy
from bregman.errors import DataError
from bregman.models.attention import NAME
from bregman.models.config import TinyKimiVLConfig
from bregman.models.policy import PolicyModel
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from bregman.types import ImagePatches, Sequence
from rl.opmd import opmd_batch_loss
from sft.loss import sft_loss

SMALL = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "sliding_window": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
    # multi-head latent attention: queries and keys of 12, values of 10
    "mla": DeepseekV3Config(
        **SMALL, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=12,
        n_shared_experts=1,
    ),
}  # fmt: skip
KIMI_VL = TinyKimiVLConfig(
    hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64, num_experts=4, expert_size=32, vision_hidden_size=32,
    vision_intermediate_size=48, vision_positions=6, initializer_range=0.15,
)  # fmt: skip
LOSSES = {"sft": sft_loss, "opmd": functools.partial(opmd_batch_loss, tau=0.3, level="sequence")}
PACKS = {  # lengths of the sequences, token budget of a micro-batch
    "across_borders": ([9, 14, 5, 22, 17, 3, 11], 1000),
    "one_long": ([41], 1000),
    "fillers": ([9, 2], 1000),
    "micro_batches": ([9, 14, 5, 22, 17, 3, 11], 30),
    "images": ([], 1000),
}
CASES = [(model, loss, "across_borders", False) for model in CONFIGS for loss in LOSSES] + [
    ("qwen3", "opmd", "one_long", False),
    ("qwen3", "opmd", "fillers", False),
    ("qwen3", "opmd", "micro_batches", False),
    ("mla", "opmd", "micro_batches", True),
    ("kimi_vl", "opmd", "images", False),
]
"""Model, loss, pack, activation checkpointing."""


def make_models(folder: Path) -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    make_tiny_kimi_vl(KIMI_VL, 0, folder / "kimi_vl")


def sequences_of(packing: str) -> list[Sequence]:
    """An image shown twice, features of one on both sides of the border between the ranks, and a text sequence; or text only."""
    if packing != "images":
        return make_sequences(PACKS[packing][0])
    rng = np.random.default_rng(0)
    wide, square, large = (
        ImagePatches(pixels=rng.standard_normal((n * m, 3, 14, 14), np.float32), grid=(n, m), num_tokens=n * m // 4)
        for n, m in ((2, 6), (4, 4), (8, 8))
    )
    made = []
    for images, length in (((square,), 50), ((wide, large), 32), ((square,), 12), ((), 60)):
        starts = np.cumsum([1, *(shown.num_tokens + 1 for shown in images)])
        places = [np.arange(start, start + shown.num_tokens) for start, shown in zip(starts, images, strict=False)]
        mask = np.arange(length) >= starts[-1]
        text = Sequence(token_ids=rng.integers(0, 256, length), loss_mask=mask, advantage=float(rng.normal()))
        made.append(replace(text, images=images, image_positions=np.concatenate(places) if images else None))
    return made


def run_case(folder: Path, case: tuple[str, str, str, bool], *, rank: int, ranks: int, context: int) -> dict[str, Any]:
    """Loss, metrics, gradients and reference log-probabilities of one step on this rank, gathered over the ranks' shards."""
    model, loss, packing, checkpointing = case
    settings = LearnerConfig(context_parallel=context, activation_checkpointing=checkpointing)
    if rank:
        sharding.load_policy = _forbidden
    learner = FSDP2Learner(settings, rank=rank, world_size=ranks, device=torch.device("cpu"))
    learner.begin_stage(folder / model, OPTIMIZER)
    groups = ranks // context
    batches = pack(sequences_of(packing), token_budget=PACKS[packing][1], normalizer=7.0, temperature=0.9, num_ranks=groups)
    batches = batches[rank // context :: groups]
    (references,) = learner.begin_iteration([batches])
    # away from the reference, so that tau pulls
    batches = [_with_reference(batch, 0.9 * logprobs - 0.1) for batch, (logprobs, _) in zip(batches, references, strict=True)]
    gradients: dict[str, torch.Tensor] = {}
    original = learner._optimizer.step

    def keep(*arguments: Any, **options: Any) -> None:
        gradients.update(
            {name: p.grad.full_tensor().clone() for name, p in learner._sharded.policy.named_parameters() if p.grad is not None}
        )
        original(*arguments, **options)

    learner._optimizer.step = keep  # type: ignore[method-assign]
    stats = learner.step(batches, LOSSES[loss], OPTIMIZER.learning_rate)
    return {
        "loss": stats.loss, "grad_norm": stats.grad_norm, "tokens": stats.num_tokens, "metrics": dict(stats.metrics),
        "gradients": gradients, "logprobs": [logprobs for logprobs, _ in references], "weights": learner._sharded.full_weights(keep=True),
    }  # fmt: skip


def _with_reference(batch: Any, reference: torch.Tensor) -> Any:
    return replace(batch, reference_logprobs=reference)


def check_refusal(folder: Path, *, rank: int, ranks: int, context: int) -> None:
    """A model whose layers look at their neighbours, unknown to attention, is refused."""
    learner = FSDP2Learner(LearnerConfig(context_parallel=context), rank=rank, world_size=ranks, device=torch.device("cpu"))
    original = Qwen3MLP.forward
    Qwen3MLP.forward = lambda self, hidden: original(self, hidden + 0.1 * hidden.roll(1, 1))
    learner._load = functools.partial(_load_unchecked, learner)  # type: ignore[method-assign]
    try:
        learner.begin_stage(folder / "qwen3", OPTIMIZER)
    except DataError as error:
        assert "on several ranks differ" in error.found
    else:
        raise AssertionError("it was not refused")
    finally:
        Qwen3MLP.forward = original


def _forbidden(folder: Path) -> PolicyModel:
    raise AssertionError(f"{folder} is rank 0's to read")


def _load_unchecked(learner: FSDP2Learner, model: Path) -> ShardedPolicy:
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation=NAME)
    return ShardedPolicy(PolicyModel(plain), learner._mesh, dtype=torch.float32, activation_checkpointing=False)


def main(folder: Path, rank: int, ranks: int, context: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{ranks}-{context}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if context > 1:
        check_refusal(folder, rank=rank, ranks=ranks, context=context)
    results = [run_case(folder, case, rank=rank, ranks=ranks, context=context) for case in CASES]
    torch.save(results, folder / f"result-{ranks}-{context}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:]))
