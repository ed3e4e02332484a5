"""One rank of the learner: holds its shard of the trained weights and optimizer, and steps.

Owns the order of forward, backward, reduction, clipping and update. Does not know which algorithm runs (a loss is passed in),
nor Ray (`learner_workers` hosts it).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bregman.engines import checkpoint
from bregman.engines.config import LearnerConfig, ModelTraining, OptimizerConfig
from bregman.engines.optimizer import ShardedOptimizer
from bregman.engines.sharding import ShardedPolicy
from bregman.engines.weight_sync import SharedMemoryWriter, WeightHandle
from bregman.errors import UserError
from bregman.models.loading import TOKENIZER_FILES, load_policy
from bregman.models.policy import IMAGE_ARGUMENTS
from bregman.protocols import LossFunction
from bregman.types import PackedBatch, StepStats

Logprobs = tuple[torch.Tensor, torch.Tensor | None]
"""Reference and, if it is kept, fixed-reference log-probabilities of one micro-batch; float32 [T] each."""


class FSDP2Learner:
    """The per-rank side of `bregman.protocols.Learner`; every method is called on all ranks in the same order.

    `torch.distributed` must be initialised. Micro-batches passed in are this rank's own.

    Args:
        config: precision and memory.
        rank: of this process.
        world_size: number of ranks.
        device: where this rank computes.
    """

    def __init__(self, config: LearnerConfig, *, rank: int, world_size: int, device: torch.device) -> None:
        self._config, self._rank, self._world_size, self._device = config, rank, world_size, device
        self._mesh = init_device_mesh(device.type, (world_size,))
        self._writer: SharedMemoryWriter | None = None

    def begin_stage(
        self, model: Path, optimizer: OptimizerConfig, *, training: ModelTraining | None = None, keep_fixed_reference: bool = False
    ) -> None:
        """Load `model` (an HF folder) and a fresh optimizer; keep a frozen copy of it for KL if asked.

        Raises:
            DataError: the folder is no model that can be trained here.
        """
        for held in ("_sharded", "_fixed", "_optimizer"):
            self.__dict__.pop(held, None)  # free the last stage's weights before the next are loaded
        self._source, self._training = model, training or ModelTraining()
        self._sharded = self._load(model)
        self._fixed = self._load(model, frozen=True) if keep_fixed_reference else None
        self._optimizer_config = optimizer
        self._optimizer = ShardedOptimizer(self._sharded.policy, optimizer)

    def begin_iteration(self, minibatches: Sequence[Sequence[PackedBatch]], *, reset_optimizer: bool = True) -> list[list[Logprobs]]:
        """Reset the optimizer if asked, and take the log-probabilities of all micro-batches under the present weights."""
        if reset_optimizer:
            self._optimizer.reset()
        reference = self._logprobs(self._sharded, minibatches)
        if self._fixed is None:
            return [[(logprobs, None) for logprobs in batches] for batches in reference]
        fixed = self._logprobs(self._fixed, minibatches)
        return [list(zip(ours, theirs, strict=True)) for ours, theirs in zip(reference, fixed, strict=True)]

    def step(self, batches: Sequence[PackedBatch], loss: LossFunction, learning_rate: float) -> StepStats:
        """One optimizer step over the micro-batches of all ranks.

        Raises:
            UserError: the loss or the gradient is not finite; the weights are as before.
        """
        started = time.perf_counter()
        total, metrics = self._accumulate(batches, loss)
        names = sorted(metrics)
        sums = [total, self._optimizer.local_norm() ** 2, _real_tokens(batches), *(metrics[name] for name in names)]
        total, squared_norm, num_tokens, *values = self._sum_over_ranks(sums)
        norm = math.sqrt(squared_norm)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._optimizer.clear()
            what = f"the loss is {total}" if not math.isfinite(total) else f"the norm of the gradient is {norm}"
            raise UserError("learner", f"{what}; the weights were left as they were", "lower optimizer.learning_rate, or look at the data")
        self._optimizer.step(learning_rate, gradient_scale=min(1.0, self._optimizer_config.max_grad_norm / (norm + 1e-6)))
        return StepStats(
            loss=total,
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=int(num_tokens),
            seconds=time.perf_counter() - started,
            metrics=dict(zip(names, values, strict=True)),
        )

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights, optimizer and RNG states into `folder`, which exists."""
        checkpoint.save(folder, self._sharded.policy, self._optimizer, rank=self._rank)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, at any number of ranks; `begin_stage` comes first."""
        checkpoint.load(folder, self._sharded.policy, self._optimizer, rank=self._rank)

    def export(self, folder: Path) -> None:
        """Write the model in float32 and in Hugging Face format, with the tokenizer of the stage's start model."""
        weights = self._sharded.full_weights(keep=self._rank == 0)
        if self._rank == 0:
            checkpoint.export(folder, self._sharded.policy.model, weights, self._source, TOKENIZER_FILES)
        self._sum_over_ranks([0.0])  # the other ranks wait until it is there

    def publish_weights(self) -> WeightHandle | None:
        """Write all weights where rollout engines can read them; the handle on rank 0, None elsewhere."""
        weights = self._sharded.hub_weights(keep=self._rank == 0)
        if self._rank != 0:
            return None
        self._writer = self._writer or SharedMemoryWriter()
        return self._writer.write(weights.items())

    def close(self) -> None:
        """Remove published weights."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def _load(self, model: Path, *, frozen: bool = False) -> ShardedPolicy:
        dtype = torch.bfloat16 if self._config.dtype == "bfloat16" else torch.float32
        policy = load_policy(model).requires_grad_(not frozen)
        return ShardedPolicy(policy, self._mesh, dtype=dtype, activation_checkpointing=self._config.activation_checkpointing and not frozen)

    def _logprobs(self, sharded: ShardedPolicy, minibatches: Sequence[Sequence[PackedBatch]]) -> list[list[torch.Tensor]]:
        with torch.no_grad():
            result = [[_forward(sharded, _to(batch, self._device)).cpu() for batch in batches] for batches in minibatches]
        sharded.reshard()
        return result

    def _accumulate(self, batches: Sequence[PackedBatch], loss: LossFunction) -> tuple[float, dict[str, float]]:
        """Backward passes of all micro-batches; loss and metrics of this rank."""
        if not batches:
            raise ValueError("a rank needs at least one micro-batch; `pack` makes fillers for that")
        total, metrics = 0.0, dict[str, float]()
        for index, batch in enumerate(batches):
            self._sharded.before_backward(last=index == len(batches) - 1)
            batch = _to(batch, self._device)
            value, parts = loss(_forward(self._sharded, batch), batch)
            value.backward()
            total += float(value.detach())
            for name, part in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(part)
        return total, metrics

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self._world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def _forward(sharded: ShardedPolicy, batch: PackedBatch) -> torch.Tensor:
    images = {name: value for name in IMAGE_ARGUMENTS if (value := getattr(batch, name)) is not None}
    return sharded.policy(batch.token_ids, batch.position_ids, batch.boundaries, batch.temperature, **images)


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def _real_tokens(batches: Sequence[PackedBatch]) -> float:
    return float(sum(int(batch.boundaries.diff()[batch.sequence_index >= 0].sum()) for batch in batches))
