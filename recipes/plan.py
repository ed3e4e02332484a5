"""How much memory a recipe needs: parameters, then per learner rank and per rollout engine, against the GPU it names.

Owns arithmetic on a model without weights. It counts what FSDP2 and vLLM keep; of activations it knows the large tensors, so its
sum is an estimate (tests hold it to within a third of what torch saves).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.engines.config import AdamWConfig, LearnerConfig, ModelTraining, MuonConfig
from bregman.models.config import HFModelConfig
from bregman.models.parts import part_of
from recipes.schema import Recipe, RLStage, SFTStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
RESERVED = 0.08
"""Share of a GPU that CUDA, NCCL and the allocator's gaps take (ours)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What of a model matters for memory. Parameters are counts, the rest elements per token.

    Attributes:
        parameters: by part of the model.
        matrices: of those, the ones that Muon updates, by part.
        experts: parameters of routed experts.
        active: parameters that one token meets.
        root: parameters outside the layers that FSDP wraps; they stay gathered through a step.
        largest_layer: parameters of the largest wrapped layer.
        layers: transformer layers of the language model.
        hidden: elements kept per token and layer where activations are checkpointed.
        layer: elements kept per token of the largest layer while it is recomputed, or of every layer without checkpointing.
        gathered_keys: elements per token that context parallelism gathers for one layer.
        kv_cache: elements per token and layer in vLLM's KV cache.
        image: elements kept per image token where the encoder's activations are checkpointed; 0 for a text model.
        image_layers: the same without checkpointing.
        image_frozen: the same where the encoder does not train: one layer at a time.
    """

    parameters: Mapping[str, int]
    matrices: Mapping[str, int]
    experts: int
    active: int
    root: int
    largest_layer: int
    layers: int
    hidden: int
    layer: int
    gathered_keys: int
    kv_cache: int
    image: int
    image_layers: int
    image_frozen: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def sizes(model: PreTrainedModel) -> Sizes:
    """The sizes of a model, on the meta device or real."""
    config = model.config.get_text_config()
    parameters: dict[str, int] = defaultdict(int)
    matrices: dict[str, int] = defaultdict(int)
    experts = 0
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        count, stacked = parameter.numel(), ".experts." in name and parameter.ndim == 3
        parameters[part_of(name)] += count
        experts += count if stacked else 0
        if stacked or (parameter.ndim == 2 and id(parameter) not in tables):
            matrices[part_of(name)] += count
    wrapped = set(model._no_split_modules or ())
    layers = [sum(p.numel() for p in module.parameters()) for module in model.modules() if type(module).__name__ in wrapped]
    total = sum(parameters.values())
    routed = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None)
    return Sizes(
        parameters=dict(parameters),
        matrices=dict(matrices),
        experts=experts,
        active=total - experts + (experts * config.num_experts_per_tok // routed if routed else 0),
        root=total - sum(layers),
        largest_layer=max(layers, default=total),
        layers=config.num_hidden_layers,
        **_per_token(config),
        **_per_image_token(getattr(model.config, "vision_config", None)),
    )


def _per_token(config: Any) -> dict[str, int]:
    width, heads = config.hidden_size, config.num_attention_heads
    rank = getattr(config, "kv_lora_rank", None)
    if rank:  # multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434) sec. 2.1
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        keys, cache = heads * (query + value), rank + config.qk_rope_head_dim
        attention = heads * query + keys + rank + heads * value
    else:
        head = getattr(config, "head_dim", None) or width // heads
        keys = cache = 2 * config.num_key_value_heads * head
        attention = 2 * heads * head + keys
    chosen = getattr(config, "num_experts_per_tok", 0) or 0
    inner = (getattr(config, "moe_intermediate_size", 0) or 0) if chosen else config.intermediate_size
    shared = getattr(config, "n_shared_experts", 0) or 0
    # of each gated unit: its input, both projections, the activation and the product
    feed_forward = max(chosen, 1) * (width + 5 * inner) + 5 * shared * inner
    # around them: the residual before attention and before the feed-forward, each also in the norm's float32 copy
    return {"hidden": width, "layer": 6 * width + attention + feed_forward, "gathered_keys": keys, "kv_cache": cache}


def _per_image_token(vision: Any) -> dict[str, int]:
    """A token stands for a square of merged patches, each with its pixels and its place in every layer."""
    if vision is None:
        return {"image": 0, "image_layers": 0, "image_frozen": 0}
    patches = vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
    pixels, width = 3 * vision.patch_size**2, vision.hidden_size
    layer = 9 * width + 2 * vision.intermediate_size
    layers = vision.num_hidden_layers
    kept = {"image": layers * width + layer, "image_layers": layers * layer, "image_frozen": layer}
    return {name: patches * (pixels + elements) for name, elements in kept.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """Memory of one learner rank in bytes, by what holds it."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def learner_plan(
    size: Sizes,
    learner: LearnerConfig,
    ranks: int,
    stage: ModelTraining,
    optimizer: AdamWConfig | MuonConfig,
    tokens: int,
    *,
    frozen_copy: bool,
) -> RankPlan:
    """Memory of one rank that trains on micro-batches of `tokens` tokens.

    Args:
        ranks: over which weights are sharded.
        tokens: of one micro-batch, before context parallelism splits it.
        frozen_copy: a fixed reference model is kept for KL.
    """
    trained = sum(count for part, count in size.parameters.items() if stage.train is None or part in stage.train)
    matrices = sum(count for part, count in size.matrices.items() if stage.train is None or part in stage.train)
    muon = isinstance(optimizer, MuonConfig)
    state = 4 * matrices + 8 * (trained - matrices) if muon else 8 * trained
    element = 2 if learner.dtype == "bfloat16" else 4
    own = tokens / learner.context_parallel
    kept = own * size.layers * size.hidden + own * size.layer if learner.activation_checkpointing else own * size.layers * size.layer
    gathered = own * (learner.context_parallel - 1) * size.gathered_keys if learner.context_parallel > 1 else 0
    if stage.train is not None and "vision_tower" not in stage.train:
        image = size.image_frozen
    else:
        image = size.image if learner.activation_checkpointing else size.image_layers
    return RankPlan(
        parts={
            "weights": 4 * size.total * (2 if frozen_copy else 1) / ranks,
            "gradients": 4 * trained / ranks,
            "optimizer": state / ranks,
            # the layer at work, the next one on its way, and the gradient of one; the root's weights and gradients; the layer
            # before is still being reduced, in float32
            "gathered layers": element * (3 * size.largest_layer + 2 * size.root) + 4 * size.largest_layer if ranks > 1 else 0,
            "activations": element * (kept + gathered),
            # if every token were an image's; each rank of a context-parallel group encodes all images
            "images (at most)": element * tokens * image,
        }
    )


def plan_lines(recipe: Recipe, model: PreTrainedModel) -> list[str]:
    """What `bregman check` says about memory, one line each."""
    size = sizes(model)
    named = ", ".join(f"{part} {_count(count)}" for part, count in sorted(size.parameters.items(), key=lambda item: -item[1]))
    experts = f"; {_count(size.experts)} in routed experts, {_count(size.active)} active per token" if size.experts else ""
    lines = [f"memory: {type(model).__name__}, {_count(size.total)} parameters ({named}){experts}"]
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, SFTStage | RLStage):
            lines += _stage_lines(recipe, size, f"[{index + 1}/{len(recipe.stages)}] {stage.name}", stage)
    sampled = any(not isinstance(stage, SFTStage) or stage.gate for stage in recipe.stages)
    return lines + (_engine_lines(recipe, size) if sampled else [])


def _stage_lines(recipe: Recipe, size: Sizes, title: str, stage: SFTStage | RLStage) -> list[str]:
    cluster, learner = recipe.cluster, recipe.learner
    longest = recipe.engine.max_model_len if isinstance(stage, RLStage) else max(phase.max_length for phase in stage.plan)
    tokens = max(learner.tokens_per_micro_batch, longest)
    frozen = isinstance(stage, RLStage) and stage.kl_coefficient > 0
    plan = learner_plan(size, learner, cluster.learner_workers, stage, stage.optimizer, tokens, frozen_copy=frozen)
    of = f"{cluster.learner_workers} learner ranks"
    if learner.context_parallel > 1:
        of += f" ({cluster.learner_workers // learner.context_parallel} data x {learner.context_parallel} context)"
    held = " + ".join(f"{name} {value / GIB:.1f}" for name, value in plan.parts.items() if value >= GIB / 20)
    lines = [f"  {title}: {of}, micro-batches of {tokens:,} tokens; GiB per rank: {held} = {plan.total / GIB:.1f}"]
    advice = "more learner_workers, a larger learner.context_parallel, activation_checkpointing, or fewer tokens per micro-batch"
    return lines + _verdict(cluster.gpu_memory_gib, plan.total / GIB, advice)


def _engine_lines(recipe: Recipe, size: Sizes) -> list[str]:
    cluster, engine = recipe.cluster, recipe.engine
    shards = max(1, int(cluster.gpus_per_rollout_worker))
    element = 4 if engine.dtype == "float32" else 2
    weights = element * size.total / shards / GIB
    per_token = element * size.kv_cache * size.layers
    line = f"  rollouts: {cluster.rollout_workers} engines of {shards} GPU; GiB per GPU: weights {weights:.1f}"
    if cluster.gpu_memory_gib is None and engine.kv_cache_mib is None:
        return [line]
    if engine.kv_cache_mib is not None:
        room = engine.kv_cache_mib / 1024
        verdict = _verdict(cluster.gpu_memory_gib, weights + room, "more GPUs per rollout worker, or a smaller engine.kv_cache_mib")
    else:
        room = (cluster.gpu_memory_gib or 0) * engine.gpu_memory_utilization - weights - 2.0  # 2 GiB: vLLM's own activations and graphs
        verdict = _verdict(room, 0.0 if room > 0 else 1.0, "more GPUs per rollout worker (gpus_per_rollout_worker)")[: int(room <= 0)]
    fits = int(max(room, 0) * GIB / per_token)
    whole = f"{fits:,} tokens = {fits // engine.max_model_len} responses of {engine.max_model_len:,}"
    return [f"{line}, KV cache {max(room, 0):.1f} ({per_token / 1024:.1f} KiB per token): {whole}", *verdict]


def _verdict(available: float | None, needed: float, advice: str) -> list[str]:
    if available is None:
        return []
    usable = available * (1 - RESERVED)
    if needed <= usable:
        return [f"    fits: {needed:.0f} of {usable:.0f} GiB usable"]
    return [f"    does NOT fit: {needed:.0f} GiB, usable are {usable:.0f} of {available:g}; {advice}"]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def config_file(model: HFModelConfig, base: Path) -> Path | None:
    """The model's own config.json if it is at hand, else the one the recipe plans with."""
    from bregman.models.loading import find_local

    folder = find_local(model.path, model.revision)
    return folder / "config.json" if folder else base / model.config if model.config else None
