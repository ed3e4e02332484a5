"""Supervised training of Bregman against TRL's `SFTTrainer` with packing, and its learner at one rank against a plain torch step.

Same model, same rows, same optimizer, on one machine in one run, one thread per process. TRL packs long-tailed conversations its own way
(best-fit decreasing, padding-free: conversations of a row do not see each other); after each of its optimizer steps Bregman trains the
very rows that TRL just trained, as a run does: laid out in the driver, sent to the learner's process, stepped there. So the steps are
paired and alternate, and the losses can be compared one by one: a relative difference above `LOSS_TOLERANCE` ends the benchmark. TRL's
time is from one step's end to the next, less Bregman's; Bregman's is that of the call. TRL also takes token accuracy and entropy of
the batch (it always does). The learning rate is that of a real run, so the curves fall.

The second table is `FSDP2Learner` in this process on one gloo rank against the same model, attention and loss under plain
`torch.optim.AdamW`, alternating, from the same weights on the same rows.

    python benchmarks/sft_step.py [--steps 12] [--rows-per-step 4] [--row 1024] [--vocabulary 4096]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; its processes take it over

import numpy as np
import torch

from bregman.data.mixture import Mixture
from bregman.data.packing import pack_rows
from bregman.data.rows import RowFiller
from bregman.engines.config import AdamWConfig, ClusterConfig, LearnerConfig
from bregman.models.loading import hide_cuda_builds, load_policy
from bregman.types import Sequence
from sft.loss import sft_loss

if TYPE_CHECKING:
    from bregman.engines.learner_workers import LearnerWorkers
    from bregman.protocols import MiniBatch

LOSS_TOLERANCE = 1e-4
OPTIMIZER = AdamWConfig(learning_rate=1e-3, betas=(0.9, 0.95))


def make_model(folder: Path, vocabulary: int, length: int) -> Path:
    """A random Qwen3 with a tokenizer that only names the special tokens: the data are token ids."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bregman.models.tiny.tokenizer import character_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=length, tie_word_embeddings=False, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    character_tokenizer("ab").save_pretrained(folder)
    return folder


def conversations(count: int, vocabulary: int, longest: int) -> list[Sequence]:
    """Long-tailed lengths; each token mostly follows from the one before, so that there is something to learn. A third is prompt."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(longest / 8), 1.0, count).astype(int), 8, longest)
    result = []
    for length in lengths.tolist():
        noise = rng.random(length) < 0.1
        ids = np.empty(length, dtype=np.int64)
        ids[0] = rng.integers(10, vocabulary)
        for place in range(1, length):
            ids[place] = rng.integers(10, vocabulary) if noise[place] else 10 + (ids[place - 1] * 5 + 1) % 64
        result.append(Sequence(token_ids=ids, loss_mask=np.arange(length) >= max(length // 3, 1)))
    return result


class Bregman:
    """The learner in its own process, and what its steps took."""

    def __init__(self, learner: LearnerWorkers) -> None:
        self.learner = learner
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, rows: list[list[Sequence]], rate: float) -> None:
        started = time.perf_counter()
        trained = sum(int(sequence.loss_mask.sum()) for row in rows for sequence in row)
        joined = [[sequence for row in rows for sequence in row]]  # TRL's rows fit one micro-batch of ours
        stats = self.learner.step(pack_rows(joined, normalizer=float(trained)), sft_loss, rate)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(stats.loss)


def against_trl(model: Path, data: list[Sequence], *, steps: int, rows_per_step: int, row: int, folder: Path) -> None:
    """Run both and print the table.

    Raises:
        RuntimeError: the losses of a step differ.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from bregman.engines import cluster
    from bregman.engines.learner_workers import LearnerWorkers

    settings = ClusterConfig()
    cluster.start(settings)
    learner = LearnerWorkers.start(LearnerConfig(), settings)
    learner.begin_stage(model, OPTIMIZER)
    bregman = Bregman(learner)

    class Recorder(SFTTrainer):  # type: ignore[misc]
        rows: list[dict[str, torch.Tensor]] = []  # noqa: RUF012 (one trainer per process)
        loss = 0.0

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            self.rows.append({name: inputs[name][0].clone() for name in ("input_ids", "labels", "position_ids")})
            value = super().training_step(model, inputs, num_items_in_batch)
            self.loss += float(value)
            return value

    class Pair(TrainerCallback):
        """Bregman's step after each of TRL's."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.tokens: list[int] = []
            self.last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.last)
            self.losses.append(trainer.loss)
            rows = [unpacked(inputs) for inputs in trainer.rows]
            self.tokens.append(sum(len(inputs["input_ids"]) for inputs in trainer.rows))
            bregman.step(rows, OPTIMIZER.learning_rate)
            trainer.loss, Recorder.rows[:] = 0.0, []
            self.last = time.perf_counter()

    config = SFTConfig(
        output_dir=str(folder), report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0, use_cpu=True,
        bf16=False, gradient_checkpointing=False, packing=True, max_length=row, per_device_train_batch_size=1,
        gradient_accumulation_steps=rows_per_step, max_steps=steps, learning_rate=OPTIMIZER.learning_rate, lr_scheduler_type="constant",
        weight_decay=0.0, adam_beta1=OPTIMIZER.betas[0], adam_beta2=OPTIMIZER.betas[1], max_grad_norm=OPTIMIZER.max_grad_norm,
    )  # fmt: skip
    rows = {"input_ids": [s.token_ids.tolist() for s in data], "completion_mask": [s.loss_mask.astype(int).tolist() for s in data]}
    pair = Pair()
    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[pair],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        learner.close()
        cluster.stop()
    differences = [abs(ours / theirs - 1) for ours, theirs in zip(bregman.losses, pair.losses, strict=True)]
    if max(differences) > LOSS_TOLERANCE:
        place = int(np.argmax(differences))
        raise RuntimeError(f"step {place}: Bregman's loss is {bregman.losses[place]:.6f}, TRL's {pair.losses[place]:.6f}")
    warm = slice(2, None)  # both allocate and compile in their first steps
    rates = {
        "TRL SFTTrainer, packing": [n / s for n, s in zip(pair.tokens, pair.seconds, strict=True)][warm],
        "Bregman": [n / s for n, s in zip(pair.tokens, bregman.seconds, strict=True)][warm],
    }
    theirs, ours = rates.values()
    print(f"loss {pair.losses[0]:.4f} -> {pair.losses[-1]:.4f} in both; largest relative difference of a step {max(differences):.1e}")
    print_table("tokens/s", rates)
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"Bregman / TRL, paired: median {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}); goal 1.5\n")


def unpacked(inputs: dict[str, torch.Tensor]) -> list[Sequence]:
    """The conversations of a row of TRL's."""
    starts = [*torch.nonzero(inputs["position_ids"] == 0)[:, 0].tolist(), len(inputs["input_ids"])]
    ids, mask = inputs["input_ids"].numpy(), (inputs["labels"] != -100).numpy()
    return [Sequence(token_ids=ids[a:b], loss_mask=mask[a:b]) for a, b in pairwise(starts)]


def against_torch(model: Path, minibatches: list[MiniBatch]) -> None:
    """The learner at one rank against a plain torch step; prints the table.

    Raises:
        RuntimeError: the losses differ.
    """
    import torch.distributed as dist

    from bregman.engines.fsdp2_learner import FSDP2Learner

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    learner = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    learner.begin_stage(model, OPTIMIZER)
    plain = load_policy(model).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, weight_decay=0.0)

    def plain_step(minibatch: MiniBatch) -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in minibatch:
            loss, _ = sft_loss(plain(batch.token_ids, batch.position_ids, batch.boundaries, batch.temperature), batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        return total

    seconds: dict[str, list[float]] = {"plain torch": [], "FSDP2Learner": []}
    for number, minibatch in enumerate(minibatches):
        steps = {
            "plain torch": lambda: plain_step(minibatch),  # noqa: B023 (called in this turn)
            "FSDP2Learner": lambda: learner.step(minibatch, sft_loss, OPTIMIZER.learning_rate).loss,  # noqa: B023
        }
        losses = []
        for name in list(steps)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            losses.append(steps[name]())
            seconds[name].append(time.perf_counter() - started)
        if abs(losses[0] / losses[1] - 1) > LOSS_TOLERANCE:
            raise RuntimeError(f"step {number}: the losses are {losses}")
    dist.destroy_process_group()
    warm = {name: values[2:] for name, values in seconds.items()}
    print_table("seconds/step", warm)
    ratios = sorted(a / b for a, b in zip(warm["FSDP2Learner"], warm["plain torch"], strict=True))
    print(f"FSDP2 / plain, paired: median {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}); goal 1.10")


def quiet() -> None:
    """No progress bars among the tables."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def print_table(unit: str, columns: dict[str, list[float]]) -> None:
    for name, values in columns.items():
        low, high = min(values), max(values)
        print(f"  {name:<26} {statistics.median(values):>10,.4g} {unit}  (from {low:,.4g} to {high:,.4g}, {len(values)} steps)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--row", type=int, default=1024, help="tokens of a packed row, and of the longest conversation")
    parser.add_argument("--vocabulary", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hide_cuda_builds()
    warnings.filterwarnings("ignore")
    quiet()
    per_step = arguments.rows_per_step * arguments.row
    data = conversations(arguments.steps * per_step // (arguments.row // 6), arguments.vocabulary, arguments.row)
    lengths = [len(sequence.token_ids) for sequence in data]
    filler = RowFiller(Mixture([len(data)], [1.0], 0).draws, lambda draw: lengths[draw.row])
    started = time.perf_counter()
    drawn = [filler.step(arguments.row, arguments.rows_per_step) for _ in range(arguments.steps)]
    filled = (time.perf_counter() - started) / (arguments.steps * arguments.rows_per_step)
    fill = sum(lengths[draw.row] for step in drawn for row in step for draw in row) / (arguments.steps * per_step)
    print(f"{len(data)} conversations of {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}")
    print(f"Bregman's own rows: {fill:.4f} full, {1000 * filled:.2f} ms to fill one\n")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", arguments.vocabulary, arguments.row)
        options = {"steps": arguments.steps, "rows_per_step": arguments.rows_per_step, "row": arguments.row}
        against_trl(model, data, folder=Path(folder) / "trl", **options)
        minibatches: list[MiniBatch] = []
        for step in drawn:
            rows = [[data[draw.row] for row in step for draw in row]]
            trained = sum(int(sequence.loss_mask.sum()) for sequence in rows[0])
            minibatches.append(pack_rows(rows, normalizer=float(trained)))
        against_torch(model, minibatches)


if __name__ == "__main__":
    main()
