"""One RL step of Bregman against one of TRL's `GRPOTrainer`: same model, prompts, sampling, rewards and loss, on one machine in one run.

First, both compute the gradient of the GRPO loss for the same completions, on-policy and with a disturbed reference so that ratios and
clipping matter; a relative difference above 1e-4 ends the benchmark. Then steps alternate (TRL, Bregman, TRL, Bregman, ...): a step is
sampling, rewards, one optimizer step and, for Bregman, also the weight sync, the log-probabilities of pi_i and the parity check. Each
process has one thread. TRL samples with Hugging Face `generate` (its vLLM mode does not run on a CPU, its continuous batching is several
times slower there) and trains in micro-batches of 64 responses, which suits it better than one batch.

Two cases, both on a model that a short SFT on the demo's demonstrations made: equal lengths (no end token: every response has
`--max-tokens` tokens) and ragged ones (the model ends its responses). Tokens are response tokens; the learning rate is so small that
the lengths stay as they are.

    python benchmarks/rl_step.py [--steps 5] [--problems 24] [--samples 8] [--max-tokens 144] [--sft-steps 200]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.data.config import PythonSource
from bregman.engines.config import AdamWConfig, SamplingConfig
from recipes.schema import Recipe, SFTStage, load_recipe
from recipes.tiny_thinking.task import operator_search
from rewards.config import RewardConfig, RewardsConfig
from rl.config import GRPOConfig as BregmanGRPOConfig
from rl.config import RLConfig

if TYPE_CHECKING:  # reward processes import this file for `even_search`: what is heavy waits until it is needed
    import torch
    from trl import GRPOConfig, GRPOTrainer

    from bregman.types import Group, Problem
    from recipes.workers import Workers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny_thinking" / "recipe.yaml"
LEARNING_RATE = 1e-7
CLIP = 0.2
TOLERANCE = 1e-4
TRL_MICRO_BATCH = 64


def even_search(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The demo's verifier, plus a hundredth of the share of even digits: every group has a signal, so every response is trained on."""
    texts = [completion if isinstance(completion, str) else str(completion[0]["content"]) for completion in completions]
    digits = [[int(character) for character in text if character.isdigit()] for text in texts]
    right = operator_search(prompts, completions, columns["digits"], columns["target"])
    return [r + 0.01 * sum(d % 2 == 0 for d in ds) / max(len(ds), 1) for r, ds in zip(right, digits, strict=True)]


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and the response tokens that it sampled and trained."""

    seconds: float
    lengths: tuple[int, ...]

    @property
    def rate(self) -> float:
        return sum(self.lengths) / self.seconds


def trl_config(folder: Path, *, num_problems: int, num_samples: int, max_tokens: int, steps: int, ignore_end: bool = False) -> GRPOConfig:
    """GRPO as in the paper with one optimizer step per iteration, float32 on the CPU, and no reports."""
    from trl import GRPOConfig

    total = num_problems * num_samples
    parts = next(n for n in range(1, total + 1) if total % n == 0 and total // n <= TRL_MICRO_BATCH)
    return GRPOConfig(
        output_dir=str(folder), report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=total // parts, gradient_accumulation_steps=parts, num_generations=num_samples,
        max_completion_length=max_tokens, generation_kwargs={"min_new_tokens": max_tokens} if ignore_end else None, temperature=1.0,
        shuffle_dataset=False, max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta2=0.95,
        loss_type="grpo", beta=0.0, epsilon=CLIP, scale_rewards="group",
    )  # fmt: skip


def trl_trainer(model: Path, config: GRPOConfig, problems: Sequence[Problem], reward: Callable[..., list[float]]) -> GRPOTrainer:
    """A trainer on the model folder with the problems as its data, in their order.

    Raises:
        RuntimeError: TRL would give the model another prompt than Bregman does.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = tokenizer.apply_chat_template([list(p.messages) for p in problems], add_generation_prompt=True)["input_ids"]
    if prompts != [list(p.prompt_ids) for p in problems]:
        raise RuntimeError("TRL and Bregman render the prompts differently")
    rows = [{"prompt": list(p.messages), "digits": p.columns["digits"], "target": p.columns["target"]} for p in problems]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_gradient(trainer: GRPOTrainer, groups: Sequence[Group], reference: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of TRL's loss for the groups, padded as TRL pads, with TRL's own formula for the advantages.

    Args:
        reference: log-probabilities of each response's tokens under pi_i, in the groups' order.
    """
    import torch
    from trl.trainer.utils import pad

    tokenizer = trainer.processing_class
    prompts = [torch.tensor(group.problem.prompt_ids) for group in groups for _ in group.trajectories]
    responses = [torch.tensor(trajectory.token_ids) for group in groups for trajectory in group.trajectories]
    rewards = torch.tensor([[trajectory.reward for trajectory in group.trajectories] for group in groups])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    inputs = {
        "prompt_ids": pad(prompts, padding_value=tokenizer.pad_token_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(responses, padding_value=tokenizer.pad_token_id),
        "completion_mask": pad([torch.ones_like(ids) for ids in responses], padding_value=0),
        "old_per_token_logps": pad(list(reference), padding_value=0.0),
        "advantages": advantages.flatten(),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def bregman_gradient(model: Path, groups: Sequence[Group], disturbance: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradient of Bregman's loss for the groups, packed as Bregman packs, and the reference log-probabilities of each response.

    Args:
        disturbance: pi_i has the model's weights, each changed by this share of itself times a normal number.
    """
    import torch

    from bregman.models.loading import load_policy
    from rl.algorithms import build_algorithm
    from rl.batches import assign_advantages, minibatches

    loss, advantages = build_algorithm(BregmanGRPOConfig(clip=CLIP))
    assigned = assign_advantages(groups, advantages, drop_truncated=False)
    total = sum(len(group.trajectories) for group in groups)
    [batches] = minibatches(assigned, steps=1, token_budget=4096, num_ranks=1, temperature=1.0, seed=0, total_responses=total)
    policy, reference_policy = load_policy(model), load_policy(model)
    torch.manual_seed(0)
    references: dict[tuple[int, ...], torch.Tensor] = {}
    for parameter in reference_policy.parameters():
        parameter.data *= 1.0 + disturbance * torch.randn_like(parameter)
    for batch in batches:
        with torch.no_grad():
            reference = reference_policy(batch.token_ids, batch.position_ids, batch.boundaries)
        value, _ = loss(policy(batch.token_ids, batch.position_ids, batch.boundaries), replace(batch, reference_logprobs=reference))
        value.backward()
        for start, end in pairwise(batch.boundaries.tolist()):
            references[tuple(batch.token_ids[start:end].tolist())] = reference[start:end][batch.loss_mask[start:end]]
    in_order = [references[(*group.problem.prompt_ids, *t.token_ids)] for group in groups for t in group.trajectories]
    return {name.removeprefix("model."): parameter.grad for name, parameter in policy.named_parameters()}, in_order


def relative_difference(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """|found - wanted| / |wanted|, Euclidean over all parameters."""
    if found.keys() != wanted.keys():
        raise RuntimeError(f"gradients of different parameters: {sorted(found.keys() ^ wanted.keys())}")
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(gradient.square().sum()) for gradient in wanted.values())) ** 0.5


def check_gradients(model: Path, groups: Sequence[Group]) -> dict[str, float]:
    """Relative difference of the two gradients, on-policy and with a disturbed reference.

    Raises:
        RuntimeError: one is above the tolerance: the two sides do not compute the same step.
    """
    with tempfile.TemporaryDirectory() as folder:
        size = {"num_problems": len(groups), "num_samples": len(groups[0].trajectories)}
        config = trl_config(Path(folder), **size, max_tokens=8, steps=1)
        trainer = trl_trainer(model, config, [group.problem for group in groups], even_search)
    differences = {}
    for name, disturbance in (("on-policy", 0.0), ("off-policy", 0.1)):
        gradient, reference = bregman_gradient(model, groups, disturbance)
        differences[name] = relative_difference(gradient, trl_gradient(trainer, groups, reference))
        if not differences[name] <= TOLERANCE:
            raise RuntimeError(f"{name}: the gradients differ by {differences[name]:.1e}, more than {TOLERANCE:.0e}")
    return differences


class QuietTracker:
    """Implements `protocols.Tracker`; keeps the metrics of the last iteration and prints warnings."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics

    def rollouts(self, step: int, groups: Sequence[Group], *, split: str = "train") -> None:
        self.lengths = tuple(len(trajectory.token_ids) for group in groups for trajectory in group.trajectories)

    def plan(self, total_steps: int) -> None: ...

    def waiting_for(self, what: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


class InOrder:
    """Implements `protocols.ProblemSampler`: the problems in their order, as TRL takes them here."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems

    def next_problems(self, count: int, iteration: int) -> list[Problem]:
        return list(self._problems[iteration * count : (iteration + 1) * count])

    def observe(self, groups: Sequence[Group]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def bregman_steps(
    workers: Workers, model: Path, config: RLConfig, problems: Sequence[Problem], tracker: QuietTracker
) -> Callable[[int], Step]:
    """A function that runs iteration i of Bregman's own RL loop, which starts from `model`."""
    import rl.loop
    from bregman.tracking.ledger import SampleLedger
    from rl.hacking_watch import HackingWatch

    workers.learner.begin_stage(model, config.optimizer)
    parts = rl.loop.Parts(
        engine=workers.engine,
        learner=workers.learner,
        sampler=InOrder(problems),
        scorer=workers.rewards.scorer(config.rewards, Path(__file__).parent),
        tracker=tracker,
        save=lambda step, state: None,
        evaluate=lambda step: {},
    )
    ledger, watch = SampleLedger(), HackingWatch(config.rewards)

    def step(iteration: int) -> Step:
        started = time.perf_counter()
        only_this = config.model_copy(update={"iterations": iteration + 1})
        rl.loop.train(only_this, parts, seed=0, tokens_per_micro_batch=4096, first=iteration, ledger=ledger, watch=watch)
        seconds = time.perf_counter() - started
        if tracker.metrics["optimizer_steps"] != 1 or tracker.metrics["groups_with_signal"] != 1:
            raise RuntimeError(f"iteration {iteration} did not train on every response: {dict(tracker.metrics)}")
        return Step(seconds, tracker.lengths)

    return step


def alternate(model: Path, config: GRPOConfig, problems: Sequence[Problem], other: Callable[[int], Step]) -> list[tuple[Step, Step]]:
    """A pair (TRL's step, the other's) for each of TRL's steps; the other's runs between two steps of TRL's own training loop."""
    from transformers import TrainerCallback

    lengths: list[tuple[int, ...]] = []
    pairs: list[tuple[Step, Step]] = []

    def reward(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        lengths.append(tuple(len(ids) for ids in completion_ids))
        return even_search(prompts, completions, **columns)

    class Alternate(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            mine = Step(time.perf_counter() - self.started, lengths[-1])
            pairs.append((mine, other(len(pairs))))
            self.started = time.perf_counter()

    trainer = trl_trainer(model, config, problems, reward)
    trainer.add_callback(Alternate())
    trainer.train()
    return pairs


def trained_a_little(workers: Workers, recipe: Recipe, start: Path, steps: int, tokenizer: Any, tracker: QuietTracker) -> Path:
    """The start model after `steps` of the demo's long-CoT SFT stage, as an HF folder: it ends its responses at various lengths."""
    import sft.loop
    from bregman.data.mixture import Mixture
    from recipes.examples import tokenised_sources

    [stage] = [stage for stage in recipe.stages if isinstance(stage, SFTStage) and stage.name == "long_cot_sft"]
    stage = stage.model_copy(update={"steps": steps, "gate": None})
    sources = tokenised_sources(stage, RECIPE.parent, tokenizer, recipe.seed, tracker.warn)
    parts = sft.loop.Parts(
        learner=workers.learner,
        tracker=tracker,
        examples=Mixture(sources, [1.0], recipe.seed).examples,
        save=lambda step, state: None,
        gate=lambda step: 0.0,
    )
    workers.learner.begin_stage(start, stage.optimizer)
    sft.loop.train(stage, parts, tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch)
    workers.learner.export(start.with_name("model"))
    return start.with_name("model")


def report(case: str, pairs: Sequence[tuple[Step, Step]], metrics: Mapping[str, float]) -> None:
    """Medians over the pairs after the first, which warms up."""
    pairs = pairs[1:]
    for name, steps in (("TRL", [trl for trl, _ in pairs]), ("Bregman", [bregman for _, bregman in pairs])):
        lengths = [length for step in steps for length in step.lengths]
        seconds = [step.seconds for step in steps]
        print(
            f"{case}, {name}: {statistics.median(seconds):.2f} s/step ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{statistics.median(step.rate for step in steps):.0f} tokens/s; {len(steps[0].lengths)} responses of "
            f"{statistics.fmean(lengths):.0f} tokens, longest {max(lengths)} (median of {len(steps)})"
        )
    phases = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}
    print(f"{case}, phases of Bregman's last step: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
    ratios = [bregman.rate / trl.rate for trl, bregman in pairs]
    print(f"{case}, tokens/s of Bregman over TRL: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side in each case, after one to warm up")
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=144)
    parser.add_argument("--sft-steps", type=int, default=200)
    options = parser.parse_args()
    from bregman.models.loading import hide_cuda_builds

    hide_cuda_builds()
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it is not asked for here
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """The gradient check, then both cases, on workers that are started once."""
    from transformers.utils import logging

    from bregman.data.sources import read_problems
    from bregman.models.tiny.make import make_tiny_qwen3
    from recipes.models import load_tokenizer
    from recipes.workers import Workers

    logging.disable_progress_bar()
    # The demo's KV cache holds its ragged responses; 192 long ones of equal length would crowd it.
    recipe = load_recipe(RECIPE, ["engine.kv_cache_mib=256"])
    make_tiny_qwen3(recipe.model, recipe.seed, folder / "start")
    tokenizer, tracker = load_tokenizer(folder / "start"), QuietTracker()
    source = PythonSource(path="task.py:train_problems")
    problems = read_problems(source, RECIPE.parent, tokenizer, seed=0, max_prompt_tokens=48)
    config = RLConfig(
        iterations=options.steps + 1,
        num_problems=options.problems,
        optimizer_steps=1,
        problems=source,
        rollout=SamplingConfig(num_samples=options.samples, max_tokens=options.max_tokens, temperature=1.0),
        rewards=RewardsConfig(functions=[RewardConfig(function=f"{Path(__file__).name}:even_search")]),
        algorithm=BregmanGRPOConfig(clip=CLIP),
        optimizer=AdamWConfig(learning_rate=LEARNING_RATE),
        reset_optimizer=False,
        parity_bound=0.001,
    )
    size = {"num_problems": options.problems, "num_samples": options.samples, "max_tokens": options.max_tokens}
    with Workers(recipe, folder / "start", tokenizer, tracker) as workers:
        model = trained_a_little(workers, recipe, folder / "start", options.sft_steps, tokenizer, tracker)
        workers.engine.load_weights(model, version=0)
        scorer = workers.rewards.scorer(config.rewards, Path(__file__).parent)
        groups = scorer.score(workers.engine.rollout(problems[-8:], config.rollout, seed=0))
        for name, difference in check_gradients(model, groups).items():
            print(f"gradient, {name}: Bregman and TRL differ by {difference:.1e} of its norm (at most {TOLERANCE:.0e})", flush=True)
        end_tokens = workers.engine.stop_token_ids
        for case, stop_token_ids in (("equal lengths", ()), ("ragged lengths", end_tokens)):
            workers.engine.stop_token_ids = stop_token_ids
            trl = trl_config(folder / "trl", **size, steps=options.steps + 1, ignore_end=not stop_token_ids)
            pairs = alternate(model, trl, problems, bregman_steps(workers, model, config, problems, tracker))
            report(case, pairs, tracker.metrics)


if __name__ == "__main__":
    main()
