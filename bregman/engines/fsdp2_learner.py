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
from bregman.engines.context_parallel import ContextShard
from bregman.engines.optimizer import ShardedOptimizer
from bregman.engines.sharding import ShardedPolicy, load_on_first_rank
from bregman.engines.weight_sync import SharedMemoryWriter, WeightHandle
from bregman.errors import DataError, UserError
from bregman.models.expert_load import ExpertLoad
from bregman.models.loading import TOKENIZER_FILES
from bregman.models.parts import train_only
from bregman.models.policy import IMAGE_ARGUMENTS
from bregman.models.rope import rope_of
from bregman.protocols import LossFunction
from bregman.types import PackedBatch, StepStats

Logprobs = tuple[torch.Tensor, torch.Tensor | None]
"""Reference and, if it is kept, fixed-reference log-probabilities of one micro-batch; float32 [T] each."""


class FSDP2Learner:
    """The per-rank side of `bregman.protocols.Learner`; every method is called on all ranks in the same order.

    `torch.distributed` must be initialised. Micro-batches passed in are this rank's own; with context parallelism, the same on the n
    consecutive ranks that share them. Weights are sharded over all ranks either way.

    Args:
        config: precision and memory.
        rank: of this process.
        world_size: number of ranks.
        device: where this rank computes.
    """

    def __init__(self, config: LearnerConfig, *, rank: int, world_size: int, device: torch.device) -> None:
        self._config, self._rank, self._world_size, self._device = config, rank, world_size, device
        self._mesh = init_device_mesh(device.type, (world_size,))
        self._context_group = _context_group(device, world_size, config.context_parallel)
        self._speaks = rank % config.context_parallel == 0
        self._writer: SharedMemoryWriter | None = None

    def begin_stage(
        self, model: Path, optimizer: OptimizerConfig, *, training: ModelTraining | None = None, keep_fixed_reference: bool = False
    ) -> None:
        """Load `model` (an HF folder) and a fresh optimizer; keep a frozen copy of it for KL if asked.

        Raises:
            DataError: the folder is no model that can be trained here.
            RecipeError: a part shall train that the model does not have.
        """
        for held in ("_sharded", "_fixed", "_optimizer"):
            self.__dict__.pop(held, None)  # free the last stage's weights before the next are loaded
        self._source, self._training = model, training or ModelTraining()
        if self._training.rope_theta is not None and self._training.rope_theta != rope_of(model)[0]:
            raise ValueError(
                f"{model} has another rotary base than the stage; `bregman.models.rope.extended` makes the folder to start from"
            )
        self._sharded = self._load(model)
        if self._context_group is not None:
            self._check_context(model, self._context_group)
        self._expert_load = ExpertLoad(self._sharded.policy)
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
        self._expert_load.clear()
        total, metrics = self._accumulate(batches, loss)
        names = sorted(metrics)
        sums = [total, _real_tokens(batches), *(metrics[name] for name in names)]
        if not self._speaks:  # another rank counts the same micro-batches
            sums = [0.0] * len(sums)
        own = [self._optimizer.local_norm() ** 2, *sums, *self._expert_load.counts()]
        squared_norm, total, num_tokens, *values = self._sum_over_ranks(own)
        norm = math.sqrt(squared_norm)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._optimizer.clear()
            what = f"the loss is {total}" if not math.isfinite(total) else f"the norm of the gradient is {norm}"
            raise UserError("learner", f"{what}; the weights were left as they were", "lower optimizer.learning_rate, or look at the data")
        self._optimizer.step(learning_rate, gradient_scale=min(1.0, self._optimizer_config.max_grad_norm / (norm + 1e-6)))
        balance = self._expert_load.balance(values[len(names) :], self._training.router_bias_rate)
        return StepStats(
            loss=total,
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=int(num_tokens),
            seconds=time.perf_counter() - started,
            metrics={**dict(zip(names, values[: len(names)], strict=True)), **balance},
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

    def publish_weights(self, engine_dtype: str | None = None) -> WeightHandle | None:
        """Write all weights where rollout engines can read them; the handle on rank 0, None elsewhere.

        Args:
            engine_dtype: of the engines, in which matrices are sent; None sends float32.

        Raises:
            ClusterError: on rank 0, if there is no room for them.
        """
        dtype = None if engine_dtype is None else getattr(torch, engine_dtype)
        weights = self._sharded.hub_weights(keep=self._rank == 0, dtype=dtype)
        if self._rank != 0:
            for _ in weights:  # nothing comes, but this rank takes part in the gathering
                pass
            return None
        self._writer = self._writer or SharedMemoryWriter()
        return self._writer.write(weights, expected_bytes=self._sharded.hub_bytes(dtype))

    def close(self) -> None:
        """Remove published weights."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def _load(self, model: Path, *, frozen: bool = False) -> ShardedPolicy:
        dtype = torch.bfloat16 if self._config.dtype == "bfloat16" else torch.float32
        policy = load_on_first_rank(model)
        whole = {name: parameter.detach() for name, parameter in policy.named_parameters()} if self._rank == 0 else {}
        if frozen:
            policy.requires_grad_(False)
        else:
            train_only(policy, self._training.train)
        checkpointing = self._config.activation_checkpointing and not frozen
        sharded = ShardedPolicy(policy, self._mesh, dtype=dtype, activation_checkpointing=checkpointing)
        if self._world_size > 1:
            sharded.scatter(whole)
        return sharded

    def _logprobs(self, sharded: ShardedPolicy, minibatches: Sequence[Sequence[PackedBatch]]) -> list[list[torch.Tensor]]:
        with torch.no_grad():
            result = [[self._forward(sharded, _to(batch, self._device)).cpu() for batch in batches] for batches in minibatches]
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
            value, parts = loss(self._forward(self._sharded, batch), batch)
            value.backward()
            total += float(value.detach())
            for name, part in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(part)
        return total, metrics

    @torch.no_grad()
    def _check_context(self, model: Path, group: dist.ProcessGroup) -> None:
        """Refuse an architecture whose layers mix tokens other than through attention: spread over ranks it would be wrong."""
        lengths = torch.tensor([13, 6], device=self._device)
        inputs = torch.arange(19, device=self._device) % 7, torch.cat([torch.arange(int(n), device=self._device) for n in lengths])
        boundaries = torch.tensor([0, 13, 19], dtype=torch.int32, device=self._device)
        try:
            shared = self._sharded.policy(*inputs, boundaries, 1.0, ContextShard(boundaries, group))
            difference = float((shared - self._sharded.policy(*inputs, boundaries)).abs().mean())
        except ValueError as error:
            raise DataError(str(model), str(error), "set learner.context_parallel to 1") from error
        self._sharded.reshard()
        if not difference < (1e-4 if self._config.dtype == "float32" else 0.1):
            found = f"its log-probabilities on several ranks differ from those on one (by {difference:.2g} nats)"
            raise DataError(str(model), found, "set learner.context_parallel to 1")

    def _forward(self, sharded: ShardedPolicy, batch: PackedBatch) -> torch.Tensor:
        images = {name: value for name in IMAGE_ARGUMENTS if (value := getattr(batch, name)) is not None}
        context = None if self._context_group is None else ContextShard(batch.boundaries, self._context_group)
        return sharded.policy(batch.token_ids, batch.position_ids, batch.boundaries, batch.temperature, context, **images)

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self._world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def _context_group(device: torch.device, world_size: int, size: int) -> dist.ProcessGroup | None:
    """The `size` consecutive ranks that share their micro-batches with this one; None where it works on its own."""
    if size == 1:
        return None
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=("data", "context"))["context"].get_group()


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def _real_tokens(batches: Sequence[PackedBatch]) -> float:
    return float(sum(int(batch.boundaries.diff()[batch.sequence_index >= 0].sum()) for batch in batches))
