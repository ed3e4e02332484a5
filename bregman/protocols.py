"""The seams: what the loops ask of engines, learners, rewards, samplers and trackers.

Owns interfaces only. The loops see these protocols; tests drive them with fakes; `bregman.engines` implements the heavy ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bregman.types import Group, ImagePatches, PackedBatch, Problem, StepStats

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from bregman.engines.config import ModelTraining, OptimizerConfig, SamplingConfig

LossFunction = Callable[["torch.Tensor", PackedBatch], "tuple[torch.Tensor, dict[str, torch.Tensor]]"]
"""`loss(logprobs, batch) -> (loss, metrics)`.

`logprobs` float32 [T]: log-probability of each token given the tokens before it in its own sequence, 0 at the first token of a
sequence. The loss is a scalar already divided by `batch.normalizer`; metrics are scalars that add up over micro-batches and ranks.
It is sent to worker processes, so it is a module-level function or a `functools.partial` of one.
"""

MiniBatch = Sequence[PackedBatch]
"""The micro-batches of one optimizer step; the learner spreads them over its ranks."""


class ImageEncoder(Protocol):
    """Turns images into what a vision-language model takes. `bregman.models.vision.load_image_encoder` makes one from a folder."""

    @property
    def placeholder_id(self) -> int:
        """The token that a chat template writes once per image, and that is repeated once per feature of the image."""

    def encode(self, image: Image) -> ImagePatches:
        """Patches of an RGB image within the resolution limit. The same image gives the same bytes.

        Raises:
            ValueError: the image is too small or too large to be encoded; one line that says what to do.
        """


class Learner(Protocol):
    """Holds the trained weights. Does not know which algorithm runs: an algorithm is a loss."""

    @property
    def num_ranks(self) -> int: ...

    def begin_stage(
        self, model: Path, optimizer: OptimizerConfig, *, training: ModelTraining | None = None, keep_fixed_reference: bool = False
    ) -> None:
        """Load `model` (an HF folder) and a fresh optimizer; keep a frozen copy of it for KL if asked.

        `training` says which parts of the model train and what of it is overridden; by default all of it, nothing.
        """

    def begin_iteration(self, minibatches: Sequence[MiniBatch], *, reset_optimizer: bool = True) -> list[MiniBatch]:
        """Reset the optimizer and return the batches with `reference_logprobs` (and `fixed_logprobs`) filled in."""

    def step(self, minibatch: MiniBatch, loss: LossFunction, learning_rate: float) -> StepStats:
        """One optimizer step over all micro-batches of `minibatch`."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights, optimizer and RNG states into `folder`, which exists."""

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, at any number of ranks."""

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format (written aside, then renamed)."""


class RolloutEngine(Protocol):
    """Samples responses. Token ids in, token ids and log-probabilities out; never re-tokenises."""

    def load_weights(self, source: Learner | Path, version: int) -> Mapping[str, float]:
        """Take over the weights of a learner or of an HF folder as policy `version`; returns timings in seconds."""

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """`sampling.num_samples` responses to each problem, in the order of `problems`.

        Every response has its own random stream derived from `seed`, its position and its sample index, so the same call on
        the same weights returns the same tokens.
        """


RewardFunction = Callable[..., "list[float | None]"]
"""TRL's signature: `f(prompts, completions, **columns) -> list[float | None]`; None means not applicable."""


class RewardScorer(Protocol):
    """Runs a set of reward functions over groups, isolated and under a deadline."""

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with `reward`, `reward_parts` and `reward_error` of every trajectory filled in."""


class ProblemSampler(Protocol):
    """Chooses which problems an iteration trains on, and learns from how they went."""

    def next_problems(self, count: int, iteration: int) -> list[Problem]: ...

    def observe(self, groups: Sequence[Group]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Tracker(Protocol):
    """Where numbers and rollouts of a run go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of the current stage at `step`."""

    def rollouts(self, step: int, groups: Sequence[Group], *, split: str = "train") -> None:
        """Store every trajectory of an iteration."""

    def plan(self, total_steps: int) -> None:
        """Say how many steps the stage will take, where that shows only once it runs."""

    def waiting_for(self, what: str) -> None:
        """Say on the console what the run is waiting for."""

    def note(self, text: str) -> None:
        """Say something worth reading once."""

    def warn(self, text: str) -> None:
        """Say something the user should know; also kept in the run folder."""
