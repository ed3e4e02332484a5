"""Milliseconds per weight sync: a learner's tensors in one process into a running vLLM in another, over shared memory.

python benchmarks/weight_sync.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, EngineConfig
from bregman.engines.rollout_workers import RolloutWorkers
from bregman.engines.weight_sync import SharedMemoryWriter, WeightHandle

SIZES = {
    "0.4M": {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "30M": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}


class InMemoryLearner:
    """Publishes the weights of a model in this process."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.writer = model, SharedMemoryWriter()

    def publish_weights(self, engine_dtype: str) -> WeightHandle:
        return self.writer.write(self.model.named_parameters())


def measure(name: str, how: Literal["shared_memory", "relay"], repeats: int, config: ClusterConfig) -> None:
    shape = SIZES[name]
    heads = shape["num_attention_heads"]
    model = Qwen3ForCausalLM(
        Qwen3Config(**shape, num_key_value_heads=heads, head_dim=32 if name == "0.4M" else 64, tie_word_embeddings=True)
    ).float()
    learner: Any = InMemoryLearner(model)
    tokenizer: Any = None  # nothing is decoded here
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        workers = RolloutWorkers.start(
            Path(folder), EngineConfig(max_model_len=128, weight_sync=how), config, tokenizer=tokenizer, stop_token_ids=()
        )
        workers.ready()
    try:
        timings = [workers.load_weights(learner, version) for version in range(repeats + 2)][2:]
    finally:
        workers.close()
        learner.writer.close()
    parts = {key: 1000 * statistics.median(timing[key] for timing in timings) for key in ("total", "publish", "relay", "load", "caches")}
    size = sum(parameter.numel() for parameter in model.parameters())
    slowest = 1000 * max(timing["total"] for timing in timings)
    print(
        f"weight sync by {how}, {size / 1e6:.2f}M parameters ({4 * size / 1e6:.1f} MB): {parts['total']:.1f} ms "
        f"(publish {parts['publish']:.1f}, relay {parts['relay']:.1f}, load {parts['load']:.1f}, caches {parts['caches']:.1f}; "
        f"median of {repeats}, slowest {slowest:.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    config = ClusterConfig()
    cluster.start(config)
    try:
        for name in SIZES:
            measure(name, "shared_memory", options.repeats, config)
            measure(name, "relay", options.repeats, config)
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
