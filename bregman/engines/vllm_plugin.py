"""What Bregman adds inside vLLM's own processes: a weight-transfer engine over shared memory, and two reload workarounds.

vLLM imports this module in each of its worker processes, through `worker_extension_cls`. Owns nothing outside those processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

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
        repack_tied_head(self.model)
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


@torch.no_grad()
def repack_tied_head(model: torch.nn.Module) -> int:
    """Pack the output heads' weights for the CPU kernel anew; returns how many heads there were.

    vLLM 0.32 packs the head's weight for its CPU kernel when the model is loaded, and skips that in a layerwise reload for a head
    that shares the input embedding's weight, which leaves the old weights in use. Every head that has a CPU kernel is packed,
    whatever its values: a step of training moves them by less than the rounding of any probe. The weight itself stays as it is,
    so that packing twice changes nothing.
    """
    repacked = 0
    for head in model.modules():
        if not isinstance(head, ParallelLMHead) or getattr(head, "cpu_linear", None) is None:
            continue
        if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            head.quant_method.process_weights_after_loading(head)
            repacked += 1
    return repacked


def _prepack_experts_on_reload() -> None:
    """Make a reload of unquantized experts repack them for the CPU kernel, as the first load does.

    vLLM 0.32 calls `fused_experts.process_weights_after_loading` on the first load only (`_setup_kernel`), so after an update
    the CPU kernel reads unpacked weights as packed ones (log-probs off by 0.5-0.9). Experts that vLLM itself processed in the
    update are left alone: where that is always so, this function can go.
    """
    original = UnquantizedFusedMoEMethod._setup_kernel

    @wraps(original)
    def setup_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        experts = self.moe_kernel.fused_experts if self.moe_kernel is not None else None
        if experts is None:
            return original(self, layer, w13, w2)
        processed = False
        process = experts.process_weights_after_loading

        def note_and_process(target: Any) -> None:
            nonlocal processed
            processed = True
            process(target)

        experts.process_weights_after_loading = note_and_process
        try:
            original(self, layer, w13, w2)
        finally:
            del experts.process_weights_after_loading
        if not processed:
            process(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel  # type: ignore[method-assign]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
    _prepack_experts_on_reload()
