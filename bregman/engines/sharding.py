"""FSDP2 around a policy: what is sharded together, in which precision, and gathering it again.

Owns every call into `torch.distributed.fsdp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.core_model_loading import revert_weight_conversion

from bregman.engines.weight_sync import wire_dtype
from bregman.errors import DataError
from bregman.models.loading import load_policy, policy_like
from bregman.models.policy import PolicyModel

SMALL_MODEL = 50_000_000
"""Parameters up to which one all-gather of the whole model on a CPU beats one per layer (16 x 64 tokens: 153 ms against 187)."""


class ShardedPolicy:
    """A policy sharded over the ranks of a mesh.

    Args:
        policy: the full model on the CPU, the same on each rank (or to be `scatter`ed); it is sharded in place and moved to the
            mesh's device.
        mesh: one dimension.
        dtype: precision of computation and gathered weights; sharded weights and gradient reduction are float32.
    """

    def __init__(self, policy: PolicyModel, mesh: DeviceMesh, *, dtype: torch.dtype, activation_checkpointing: bool) -> None:
        self.policy = policy.train()  # transformers checkpoints activations in training mode only; dropout is off
        if activation_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        precision = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
        per_layer = mesh.device_type != "cpu" or sum(p.numel() for p in policy.parameters()) > SMALL_MODEL
        if per_layer:
            model: Any = policy.model
            model.always_encode = True  # vision blocks are gathered one by one: every rank has to ask for them, images or not
            layer_types = set(policy.model._no_split_modules or ())
            for module in policy.model.modules():
                if type(module).__name__ in layer_types:
                    fully_shard(module, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        self._deferred = not per_layer
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                # Losses are divided by a global normaliser, so gradients add up over ranks; gloo has sums only.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    @torch.no_grad()
    def scatter(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the full `weights` of rank 0, by parameter name, one after the other, and its buffers; empty on other ranks."""
        for name, parameter in self.policy.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            whole = weights[name].to(local.device) if weights else torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
            local.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local())
        for buffer in self.policy.buffers():
            dist.broadcast(buffer, src=0)

    def before_backward(self, *, last: bool) -> None:
        """Announce a micro-batch. A small model adds gradients up on each rank and reduces them after the last micro-batch only; a
        large one reduces each time, since whole unsharded gradients would not fit."""
        if self._deferred:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)
        self._root.set_is_last_backward(last)

    def reshard(self) -> None:
        """Free gathered weights: after a forward pass without a backward pass they would outlive the next change of the weights."""
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_weights(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """All weights, gathered on the CPU, under their names in `policy.model`, tied ones once. Every rank must call it; where
        `keep` is False the result is empty."""
        return _gathered(_unique_state(self.policy), keep=keep)

    def hub_weights(self, *, keep: bool, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """`full_weights` under the names and in the layout of the checkpoint on disk (experts one by one, for instance).

        They are gathered a few layers at a time, so that no rank ever holds them all. Every rank must go through to the end, where
        `keep` is False to no result.

        Args:
            dtype: of the engines they are for, which decides on that of each tensor (`weight_sync.wire_dtype`); None keeps float32.
        """
        for portion in _portions(_unique_state(self.policy)):
            gathered = _gathered(((name, tensor.to(wire_dtype(name, tensor, dtype))) for name, tensor in portion), keep=keep)
            if keep:
                yield from revert_weight_conversion(self.policy.model, gathered).items()

    def hub_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all `hub_weights`."""
        return sum(tensor.numel() * wire_dtype(name, tensor, dtype).itemsize for name, tensor in _unique_state(self.policy))

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.policy, FSDPModule)
        return self.policy


def load_on_first_rank(folder: Path) -> PolicyModel:
    """The policy in `folder`, read by rank 0 alone; the other ranks get the same without its weights, for `ShardedPolicy.scatter`.

    Raises:
        DataError: on every rank, if the folder is no model that can be trained here.
    """
    if dist.get_world_size() == 1:
        return load_policy(folder)
    policy: PolicyModel | None = None
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            policy = load_policy(folder)
            answer = [(type(policy.model), policy.model.config)]
        except DataError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], DataError):
        raise answer[0]
    return policy if policy is not None else policy_like(*answer[0])


def _unique_state(policy: PolicyModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the model, each once."""
    model = policy.model
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


def _gathered(state: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU; none where `keep` is False, after the same collective calls."""
    gathered: dict[str, torch.Tensor] = {}
    for name, tensor in state:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


def _portions(state: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Whole layers, several of them where they are small; what belongs to no layer is one. Tensors that become one on disk, or the
    other way round, are of one layer."""
    layers: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in state:
        layer = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(layer[1] if layer else "", []).append((name, tensor))
    portion: list[tuple[str, torch.Tensor]] = []
    for tensors in layers.values():
        portion += tensors
        if sum(tensor.numel() for _, tensor in portion) >= SMALL_MODEL:
            yield portion
            portion = []
    if portion:
        yield portion
