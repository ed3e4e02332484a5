"""What Bregman changes in vLLM, registered as a `vllm.general_plugins` entry point: Kimi-VL's image processing and workarounds of CPU bugs.

vLLM calls `register` in every one of its processes, whatever model it serves, so that `vllm serve` on an exported folder needs nothing
else. Importing this module is cheap. Owns no weights (see `vllm_transfer`) and no images (see `vllm_kimi_vl`).
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from packaging.version import Version

WRITTEN_FOR = (0, 32)  # the vLLM release of the CPU workarounds; another one is left as it is
ARCHITECTURE = "KimiVLForConditionalGeneration"


def register() -> None:
    """Point vLLM's Kimi-VL at Bregman's image processing and mend its CPU kernels; calling it again does nothing.

    The model class is named, not imported: a process that serves another model never loads it. On a GPU nothing else is touched.
    """
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.transformers_utils.configs.kimi_vl import KimiVLConfig

    from bregman.models.kimi_vl import processor

    ModelRegistry.register_model(ARCHITECTURE, f"bregman.engines.vllm_kimi_vl:{ARCHITECTURE}")
    processor.register(KimiVLConfig)  # vLLM opens tokenizers through the Auto classes, before it loads a model class
    if current_platform.is_cpu() and has_known_bugs():
        rotate_heads_natively()
        prepack_experts_on_reload()


def has_known_bugs() -> bool:
    """Whether the installed vLLM is the release whose CPU bugs the workarounds were written for and tested with."""
    import vllm

    return Version(vllm.__version__).release[:2] == WRITTEN_FOR


def rotate_heads_natively() -> None:
    """Rotate queries of shape [tokens, heads, dim] with more than one head in torch rather than in the CPU kernel.

    The kernel of vLLM 0.32 is wrong for that shape, which DeepSeek models pass (log-probs off by 0.4-0.7). Other shapes, and
    so other models, keep the kernel.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() == 3 and query.shape[1] > 1:
            return self.forward_native(positions, query, key)
        return original(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu  # type: ignore[method-assign]


def prepack_experts_on_reload() -> None:
    """Make a reload of unquantized experts repack them for the CPU kernel, as the first load does.

    vLLM 0.32 calls `fused_experts.process_weights_after_loading` on the first load only (`_setup_kernel`), so after an update
    the CPU kernel reads unpacked weights as packed ones (log-probs off by 0.5-0.9). Experts that vLLM itself processed in the
    update are left alone: where that is always so, this function can go.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel
    if hasattr(original, "__wrapped__"):
        return

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


@torch.no_grad()
def repack_tied_head(model: torch.nn.Module) -> int:
    """Pack the output heads' weights for the CPU kernel anew after a reload; returns how many heads there were.

    vLLM 0.32 packs the head's weight for its CPU kernel when the model is loaded, and skips that in a layerwise reload for a head
    that shares the input embedding's weight, which leaves the old weights in use. Every head that has a CPU kernel is packed,
    whatever its values: a step of training moves them by less than the rounding of any probe. The weight itself stays as it is,
    so that packing twice changes nothing.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    repacked = 0
    for head in model.modules():
        if not isinstance(head, ParallelLMHead) or getattr(head, "cpu_linear", None) is None:
            continue
        if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            head.quant_method.process_weights_after_loading(head)
            repacked += 1
    return repacked
