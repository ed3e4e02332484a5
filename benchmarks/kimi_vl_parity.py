"""Log-probabilities of sampled tokens under vLLM against those under the learner's model, for a small random Kimi-VL.

Latent attention, experts and MoonViT; prompts of text, of one image and of two images of different sizes; on the weights the engine
was built from, after a weight sync to other weights, and back. Tokens at or after a routing flip (a position where the two chose
different experts, or where the learner's choice was nearer to a tie than rounding) are counted, and kept apart from the rest.

    python benchmarks/kimi_vl_parity.py [--samples 32] [--max-tokens 32]

`tiny` is the size of the tiny recipe, whose latent attention vLLM computes as plain attention; `latent 576` has the attention sizes
of Kimi-VL-A3B, and vLLM's latent kernel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from bregman import types
from bregman.data.packing import pack
from bregman.engines.config import EngineConfig
from bregman.engines.vllm_engine import Generation, GenerationRequest, VLLMEngine
from bregman.engines.weight_sync import SharedMemoryWriter, WeightHandle
from bregman.models.config import TinyKimiVLConfig
from bregman.models.loading import load_policy
from bregman.models.policy import PolicyModel
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from bregman.models.vision import load_image_encoder
from bregman.protocols import ImageEncoder

MODELS = {
    "tiny": TinyKimiVLConfig(initializer_range=0.1, max_image_patches=64),
    "latent 576": TinyKimiVLConfig(
        initializer_range=0.1, max_image_patches=64, kv_lora_rank=512, rope_head_dim=64, nope_head_dim=128, value_head_dim=128, num_heads=2
    ),
}
ENGINE = {"max_model_len": 256, "max_num_seqs": 128, "kv_cache_mib": 32, "max_num_batched_tokens": 2048}
CASES = {"text": (), "one image": ((60, 40),), "two images": ((90, 50), (30, 120))}
"""Sizes of the images of each kind of prompt: width, height in pixels."""
TOP_K = 2
"""Experts per token of both models."""
TIE = 1e-5
"""Router scores closer than this may be ordered either way."""


@dataclass(frozen=True)
class Parity:
    """How far two sets of log-probabilities of the same sampled tokens are apart.

    Attributes:
        differences: float32 [tokens], nats, of tokens before any routing flip of their sequence.
        after_flips: float32, of the others.
        flips: positions, prompts included, where some layer's choice of experts differs or is a tie.
        positions: how many positions there are.
    """

    differences: torch.Tensor
    after_flips: torch.Tensor
    flips: int
    positions: int

    def row(self) -> str:
        """Cells of a table."""
        cells = [_cell(self.differences), f"{self.flips} of {self.positions}", _cell(self.after_flips)]
        return "| " + " | ".join(cells) + " |"


def _cell(differences: torch.Tensor) -> str:
    if not len(differences):
        return "no tokens"
    return f"max {differences.max():.1e}, mean {differences.mean():.1e}, {len(differences)} tokens"


def write_model(config: TinyKimiVLConfig, seed: int, folder: Path) -> Path:
    """A random model whose biases and norms are random too, and which likes to sample the image placeholder; returns `folder`."""
    make_tiny_kimi_vl(config, seed, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    random = np.random.default_rng(seed + 1000)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            weights[name] = tensor + random.standard_normal(tensor.shape, np.float32) * np.float32(0.05)
    encoder = load_image_encoder(folder)
    assert encoder is not None
    weights["language_model.lm_head.weight"][encoder.placeholder_id] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def make_requests(encoder: ImageEncoder, samples: int, max_tokens: int, seed: int = 0) -> dict[str, list[GenerationRequest]]:
    """`samples` requests for one prompt of each kind; a placeholder also stands where no image is meant."""
    random = np.random.default_rng(seed)
    requests = {}
    for name, sizes in CASES.items():
        pixels = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        images = tuple(encoder.encode(Image.fromarray(one)) for one in pixels)
        ids = [*random.integers(0, 256, 8).tolist(), encoder.placeholder_id]
        positions: list[int] = []
        for image in images:
            positions += range(len(ids) + 2, len(ids) + 2 + image.num_tokens)
            ids += [*random.integers(0, 256, 2).tolist(), *[encoder.placeholder_id] * image.num_tokens, 7]
        ids += random.integers(0, 256, 5).tolist()
        requests[name] = [
            GenerationRequest(prompt_ids=tuple(ids), max_tokens=max_tokens, seed=sample, images=images, image_positions=tuple(positions))
            for sample in range(samples)
        ]
    return requests


def live_weights(policy: PolicyModel, writer: SharedMemoryWriter) -> WeightHandle:
    """Publish the weights of a model in memory, as a learner does."""
    return writer.write(revert_weight_conversion(policy.model, dict(policy.model.state_dict())).items())


def measure(engine: VLLMEngine, policy: PolicyModel, requests: dict[str, list[GenerationRequest]]) -> dict[str, Parity]:
    """Sample all requests in one call and compare."""
    flat = [request for group in requests.values() for request in group]
    generations = dict(zip(map(id, flat), engine.generate(flat), strict=True))
    return {name: _compare(engine, policy, group, [generations[id(r)] for r in group]) for name, group in requests.items()}


@torch.no_grad()
def _compare(engine: VLLMEngine, policy: PolicyModel, requests: Sequence[GenerationRequest], generations: Sequence[Generation]) -> Parity:
    sequences = [_sequence(request, generation) for request, generation in zip(requests, generations, strict=True)]
    (batch,) = pack(sequences, token_budget=1_000_000, normalizer=1.0)
    images = {name: getattr(batch, name) for name in ("pixel_values", "image_grid", "image_positions", "image_rows")}
    given = {name: tensor for name, tensor in images.items() if tensor is not None}
    model: Any = policy.model
    with _choices(model.language_model.model.layers) as learner:
        logprobs = policy(batch.token_ids, batch.position_ids, batch.boundaries, **given)
    assert batch.rollout_logprobs is not None
    differences = (logprobs - batch.rollout_logprobs).abs()
    rescored = [_rescored(engine, requests[index], generations[index]) for index in batch.sequence_index.tolist()]
    ours, theirs = torch.cat([ids for ids, _ in learner], 1), torch.cat(rescored)
    ties = torch.stack([margin for _, margin in learner]).amin(0) < TIE
    flipped = (ours != theirs).any(1) | ties
    before = torch.cat([flipped[start:end].cumsum(0) for start, end in zip(batch.boundaries[:-1], batch.boundaries[1:], strict=True)]) == 0
    return Parity(differences[batch.loss_mask & before], differences[batch.loss_mask & ~before], int(flipped.sum()), len(flipped))


def _sequence(request: GenerationRequest, generation: Generation) -> types.Sequence:
    prompt, response = len(request.prompt_ids), len(generation.token_ids)
    return types.Sequence(
        token_ids=np.array([*request.prompt_ids, *generation.token_ids]),
        loss_mask=np.arange(prompt + response) >= prompt,
        rollout_logprobs=np.array([0.0] * prompt + list(generation.logprobs), dtype=np.float32),
        images=request.images,
        image_positions=np.array(request.image_positions) if request.images else None,
    )


def _rescored(engine: VLLMEngine, request: GenerationRequest, generation: Generation) -> torch.Tensor:
    """The experts that vLLM chooses for each position of prompt and response, in one prefill; int64 [positions, layers * top_k]."""
    ids = (*request.prompt_ids, *generation.token_ids)
    once = GenerationRequest(prompt_ids=ids, max_tokens=1, images=request.images, image_positions=request.image_positions)
    with _choices(vllm_model(engine).language_model.model.layers) as chosen:
        engine.generate([once])
    return torch.cat([ids for ids, _ in chosen], 1)


def vllm_model(engine: VLLMEngine) -> Any:
    """The model inside an engine, which runs in this process."""
    (model,) = engine.llm.collective_rpc(_model)
    return model


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model()


@contextmanager
def _choices(layers: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per expert layer, in the order of the layers: the experts chosen, ascending, and by how much the last of them was ahead."""
    gates = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(gate: Any, _: Any, output: Any) -> None:
        scores = output[0].float().sigmoid() + gate.e_score_correction_bias.float()
        top = scores.topk(TOP_K + 1, dim=-1)
        found.append((top.indices[:, :TOP_K].sort(-1).values, top.values[:, TOP_K - 1] - top.values[:, TOP_K]))

    hooks = [gate.register_forward_hook(note) for gate in gates]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run(size: str, dtype: str, samples: int, max_tokens: int) -> None:
    """Print the rows of one engine."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_model(MODELS[size], seed, Path(scratch) / str(seed)) for seed in (0, 1)]
        encoder = load_image_encoder(folders[0])
        assert encoder is not None
        requests = make_requests(encoder, samples, max_tokens)
        policies = [load_policy(folder, getattr(torch, dtype)) for folder in folders]
        masters = [load_policy(folder) for folder in folders]
        engine = VLLMEngine(str(folders[0]), EngineConfig(dtype=dtype, **ENGINE))  # type: ignore[arg-type]
        writer = SharedMemoryWriter()
        for version, (state, which) in enumerate((("fresh", 0), ("a -> b", 1), ("a -> b -> a", 0))):
            if version:
                engine.load_weights(live_weights(masters[which], writer), version)
            for case, parity in measure(engine, policies[which], requests).items():
                print(f"| {size} | {dtype} | {case} | {state} {parity.row()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="responses per prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens per response")
    parser.add_argument("--engine", nargs=2, metavar=("SIZE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        size, dtype = options.engine
        return run(size, dtype, options.samples, options.max_tokens)
    print("| model | dtype | prompt | weights | difference in nats before a flip | routing flips | difference after a flip |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in MODELS:
        for dtype in ("float32", "bfloat16"):  # a process each: an engine's settings are its process's
            numbers = ["--samples", str(options.samples), "--max-tokens", str(options.max_tokens)]
            command = [sys.executable, __file__, *numbers, "--engine", size, dtype]
            done = subprocess.run(command, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.stderr)


if __name__ == "__main__":
    main()
