"""The vLLM side of weight sync: a weight-transfer engine over shared memory.

vLLM imports this module in each of its worker processes, through `worker_extension_cls`. Owns nothing outside those processes; what a
handle is and who writes the segment is in `weight_sync`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from bregman.engines import vllm_plugin
from bregman.engines.weight_sync import WeightHandle, read_tensors, sample_indices
from bregman.errors import ClusterError

BACKEND = "bregman_shared_memory"
UNCHANGED_BY_LOADING = ("norm.weight", "embed_tokens.weight")  # names whose values vLLM keeps as they are in the checkpoint


class WorkerExtension:
    """Named in `worker_extension_cls` so that vLLM's workers import this module."""


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: the handle says it all."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """A full set of weights: `WeightHandle.to_dict()`."""

    handle: dict[str, Any]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads the weights of a `WeightHandle` into the model, layer by layer as vLLM's own engines do."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """No rendezvous is needed."""

    def start_weight_update(self) -> None:
        self._samples: dict[str, torch.Tensor] = {}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        load: Any = self.model.load_weights
        load(self._remembering_samples(WeightHandle.from_dict(update_info.handle)))

    def finish_weight_update(self) -> None:
        """Finish the reload and compare what the model now holds with what was sent.

        Raises:
            ClusterError: the model holds other values.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        if vllm_plugin.has_known_bugs():
            vllm_plugin.repack_tied_head(self.model)
        for name, parameter in self.model.named_parameters():
            sent = self._samples.get(name)
            if sent is not None and not torch.equal(_sampled(parameter), sent.to(parameter.dtype)):
                raise ClusterError("weight sync", f"`{name}` in the rollout engine differs from what the learner sent")
        self._samples = {}

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _remembering_samples(self, handle: WeightHandle) -> Any:
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for name, tensor in read_tensors(handle):
            if name.endswith(UNCHANGED_BY_LOADING) and shapes.get(name) == tensor.shape:
                self._samples[name] = _sampled(tensor)
            yield name, tensor


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[sample_indices(flat.numel()).to(flat.device)].cpu()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
    vllm_plugin.register()  # in workers of their own, where `VLLMEngine` cannot
