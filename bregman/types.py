"""The data that flows between rooms: problems in, trajectories and groups through, packed batches out.

Owns plain frozen records (picklable; CPU tensors or numpy only). Owns no behaviour beyond small derived properties, and
imports torch for annotations only, so `import rewards` stays light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Message = Mapping[str, Any]
"""A chat message: `{"role": str, "content": str | list[part]}` as Hugging Face chat templates take it."""

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]
"""Why generation of a response ended; `abort` is an unfinished response that can be continued, `error` a lost engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A prompt with a checkable answer.

    Attributes:
        id: unique within its problem set; sampler statistics are kept under it.
        messages: the conversation up to the turn that the policy writes.
        prompt_ids: token ids of the rendered chat template with its generation prompt and expanded image placeholders, length P.
        images: image payloads in the order of their placeholders (empty for text), as `bregman.data.images` takes them.
        patches: the same images as the model takes them; empty until they are encoded.
        image_positions: places in `prompt_ids` of the placeholder tokens that stand for image features, ascending.
        answer: the gold answer, if the data has one.
        difficulty: label in [0, 1], 0 easiest; None if the data has none.
        source: name of the data source, for tracking.
        columns: every column of the row, passed to reward functions by name.
    """

    id: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    images: tuple[Any, ...] = ()
    patches: tuple[ImagePatches, ...] = ()
    image_positions: tuple[int, ...] = ()
    answer: str | None = None
    difficulty: float | None = None
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A supervised example before tokenisation.

    Attributes:
        id: unique within its source; named in errors.
        messages: all turns, the assistant's included; one with `train: false` is not a training target.
        images: image payloads in the order of their placeholders.
        source: name of the data source.
        tools: schemas of the functions that the assistant may call, as chat templates take them.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePatches:
    """An image as a vision model takes it.

    Attributes:
        pixels: float32 [rows * columns, channels, patch, patch], normalised, row by row.
        grid: (rows, columns) of patches.
        num_tokens: tokens that the image takes in the text, after the projector merged neighbouring patches.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One token sequence ready to be packed: a tokenised conversation, or a prompt with a sampled response.

    Attributes:
        token_ids: int64 [n].
        loss_mask: bool [n]; True where the token itself is a training target. Never True at index 0.
        advantage: weight of the sequence in a policy loss (r - baseline); 0 for supervised data.
        rollout_logprobs: float32 [n], nats, the engine's log-probability of each response token; 0 elsewhere. None for SFT.
        images: in the order in which the sequence shows them. Sequences that show the same image share the object: it is
            encoded once per pack.
        image_positions: int64 [sum of num_tokens], ascending: the placeholder tokens that stand for image features. Positions
            rather than a token id, since a policy may sample that id.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    advantage: float = 0.0
    rollout_logprobs: np.ndarray | None = None
    images: tuple[ImagePatches, ...] = ()
    image_positions: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of response tokens sampled by one policy.

    Attributes:
        policy_version: the RL iteration whose weights sampled the tokens.
        length: number of tokens.
    """

    policy_version: int
    length: int


class Fate(StrEnum):
    """The one ledger bin in which a rollout ends."""

    TRAINED = "trained"
    ZERO_VARIANCE = "zero_variance"
    TOO_LONG = "too_long"
    REWARD_FAILED = "reward_failed"
    STALE = "stale"
    ENGINE_LOST = "engine_lost"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One sampled response to a problem.

    Attributes:
        problem_id: the problem answered.
        sample_index: 0 <= index < k within the group.
        token_ids: response token ids, the end token included, length n.
        logprobs: nats, length n, the engine's log-probability of each response token at the sampling temperature.
        segments: which policy sampled which tokens; lengths add up to n.
        finish_reason: why it ended.
        text: the response decoded, special tokens of the thinking format kept, end token dropped.
        reward: total reward; None before scoring, or when the reward failed.
        reward_parts: every reward and metric by name; None means not applicable.
        reward_error: what went wrong in scoring, naming the reward; empty if nothing did.
        advantage: reward minus baseline; None before advantages are computed.
        fate: the ledger bin; None until the iteration decides.
    """

    problem_id: str
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    segments: tuple[Segment, ...]
    finish_reason: FinishReason
    text: str
    reward: float | None = None
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    reward_error: str = ""
    advantage: float | None = None
    fate: Fate | None = None

    @property
    def primary(self) -> float | None:
        """The recipe's first reward, reported as accuracy; None before scoring, or when it failed."""
        return next(iter(self.reward_parts.values()), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A problem with its k sampled responses."""

    problem: Problem
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Sequences laid end to end: one forward pass of one rank. T tokens, S sequences.

    Attributes:
        token_ids: int64 [T].
        position_ids: int64 [T], 0 at the start of each sequence.
        boundaries: int32 [S + 1], cumulative sequence lengths (`cu_seqlens`), boundaries[0] = 0, boundaries[S] = T.
        loss_mask: bool [T]; True where the token is a training target.
        advantages: float32 [S].
        sequence_index: int64 [S], index of each sequence in the list that was packed; -1 for a filler.
        normalizer: what the loss of the whole optimizer step is divided by: the same number in every micro-batch and on
            every rank, so that neither packing nor ranks change a gradient.
        temperature: sampling temperature at which log-probabilities are taken.
        rollout_logprobs: float32 [T], nats, the engine's log-probabilities of response tokens; None for SFT.
        reference_logprobs: float32 [T], nats, under the policy pi_i at the start of the iteration; None before
            `Learner.begin_iteration`.
        fixed_logprobs: float32 [T], nats, under the fixed reference model; None unless the recipe asks for that KL.
        pixel_values: float32 [patches, channels, patch, patch] of all distinct images of the batch in one sequence; None for text.
        image_grid: int64 [images, 2], rows and columns of patches of each distinct image; None for text.
        image_positions: int64 [F], positions in the pack that take image features; None for text.
        image_rows: int64 [F], which row of the concatenated features of all distinct images each of them takes; None for text.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    boundaries: torch.Tensor
    loss_mask: torch.Tensor
    advantages: torch.Tensor
    sequence_index: torch.Tensor
    normalizer: float
    temperature: float = 1.0
    rollout_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    fixed_logprobs: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_grid: torch.Tensor | None = None
    image_positions: torch.Tensor | None = None
    image_rows: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.boundaries.shape[0]) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimizer step did, already reduced over micro-batches and ranks.

    Attributes:
        loss: the normalised loss.
        grad_norm: global L2 norm before clipping.
        learning_rate: the rate the step used.
        num_tokens: tokens forwarded, prompts included, fillers not.
        seconds: wall time of the step.
        metrics: sums returned by the loss over all micro-batches and ranks.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of one evaluation pass.

    Attributes:
        accuracy: mean of the primary reward over all samples (avg@k).
        pass_at_k: share of problems with at least one sample right (reward >= 1).
        mean_tokens: mean response length in tokens.
        num_problems: problems evaluated.
        samples_per_problem: k.
        truncated: share of responses cut at the token limit.
        metrics: mean of every reward part and metric that applied.
    """

    accuracy: float
    pass_at_k: float
    mean_tokens: float
    num_problems: int
    samples_per_problem: int
    truncated: float
    metrics: Mapping[str, float] = field(default_factory=dict)
