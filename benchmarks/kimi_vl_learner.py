"""CPU time of a learner step of the default tiny Kimi-VL, one thread: text, images of two sizes, an image shared by eight sequences.

    python benchmarks/kimi_vl_learner.py [--sequences 64] [--text 64]

Tokens count image tokens too. `language_model` is a stage that trains no other part (`train: [language_model]`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
import torch.distributed as dist

from bregman.data.packing import pack
from bregman.engines.config import AdamWConfig, LearnerConfig, ModelPart, ModelTraining
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.models.config import TinyKimiVLConfig
from bregman.models.loading import load_policy
from bregman.models.parts import part_of
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from bregman.types import ImagePatches, Sequence
from sft.loss import sft_loss

BATCHES = {"text": (0, 1), "8 x 8 patches": (8, 1), "8 x 8 patches, each shown by 8": (8, 8), "16 x 16 patches": (16, 1)}
TRAINED: dict[str, list[ModelPart] | None] = {"all parts": None, "language_model": ["language_model"]}


def make_sequences(count: int, text: int, side: int, shown_by: int) -> list[Sequence]:
    """`side` 0: no images."""
    rng = np.random.default_rng(0)
    sequences: list[Sequence] = []
    for index in range(count):
        if side and index % shown_by == 0:
            pixels = rng.standard_normal((side * side, 3, 14, 14), np.float32)
            image = ImagePatches(pixels=pixels, grid=(side, side), num_tokens=side * side // 4)
        length = text + side * side // 4
        sequences.append(
            Sequence(
                token_ids=rng.integers(0, 256, length),
                loss_mask=np.arange(length) > length - text,
                images=(image,) if side else (),
                image_positions=np.arange(image.num_tokens) if side else None,
            )
        )
    return sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--text", type=int, default=64, help="text tokens of a sequence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_tiny_kimi_vl(TinyKimiVLConfig(), 0, model)
        counts: Counter[str] = Counter()
        for name, parameter in load_policy(model).named_parameters():
            counts[part_of(name)] += parameter.numel()
        print(", ".join(f"{part}: {count:,} parameters" for part, count in counts.items()), f"({counts.total():,} in all)")
        print("| trained | sequences | tokens | CPU ms | tokens/s |\n|---|---|---|---|---|")
        for label, parts in TRAINED.items():
            learner = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
            learner.begin_stage(model, AdamWConfig(learning_rate=1e-4), training=ModelTraining(train=parts))
            for name, (side, shown_by) in BATCHES.items():
                sequences = make_sequences(options.sequences, options.text, side, shown_by)
                batches = pack(sequences, token_budget=8192, normalizer=float(options.sequences * options.text))
                seconds = []
                for _ in range(6):
                    started = time.process_time()
                    stats = learner.step(batches, sft_loss, 1e-4)
                    seconds.append(time.process_time() - started)
                best = min(seconds)
                print(f"| {label} | {name} | {stats.num_tokens:,} | {best * 1000:.0f} | {stats.num_tokens / best:,.0f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
