"""From scored groups to training batches: advantages, the fate of every rollout, and minibatches.

Owns what is trained and what is not. Packing itself is `bregman.data.packing`; the loss is the algorithm's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bregman.data.packing import pack
from bregman.protocols import MiniBatch
from bregman.types import Fate, Group, Problem, Trajectory
from bregman.types import Sequence as TokenSequence
from rl.algorithms import AdvantageFunction


def assign_advantages(
    groups: Sequence[Group], advantages: AdvantageFunction, *, drop_truncated: bool, train_without_signal: bool = False
) -> list[Group]:
    """Groups in which every trajectory has its fate, and those that can be trained on have their advantage.

    The baseline of a group is taken over its usable trajectories only. A group without any signal (all advantages 0) has a policy
    gradient of 0: k1.5 Eq. (3); it is not trained, since a fresh Adam would turn its tiny tau term into a full step. With
    `train_without_signal` it is: a KL penalty pulls there as well.
    """
    return [_with_advantages(group, advantages, drop_truncated, train_without_signal) for group in groups]


def has_signal(group: Group) -> bool:
    """Whether the policy gradient of the group is not 0."""
    return any(trajectory.advantage for trajectory in group.trajectories)


def is_trained(group: Group) -> bool:
    return any(trajectory.fate == Fate.TRAINED for trajectory in group.trajectories)


def minibatches(
    groups: Sequence[Group], *, steps: int, token_budget: int, num_ranks: int, temperature: float, seed: int, total_responses: int
) -> list[MiniBatch]:
    """The groups with signal, shuffled and dealt out to at most `steps` optimizer steps, packed.

    Args:
        total_responses: responses sampled in the iteration, those without signal included: Eq. (3) averages over them too, so
            each step's loss is divided by its equal share of them.
    """
    order = list(groups)
    random.Random(f"minibatches {seed}").shuffle(order)
    shares = [order[start::steps] for start in range(min(steps, len(order)))]
    return [
        pack(
            [sequence for group in share for sequence in _sequences(group)],
            token_budget=token_budget,
            normalizer=total_responses / steps,
            temperature=temperature,
            num_ranks=num_ranks,
        )
        for share in shares
    ]


def _with_advantages(group: Group, advantages: AdvantageFunction, drop_truncated: bool, train_without_signal: bool) -> Group:
    fates = [_early_fate(trajectory, drop_truncated) for trajectory in group.trajectories]
    usable = [index for index, fate in enumerate(fates) if fate is None]
    values = dict(zip(usable, advantages([group.trajectories[i].reward for i in usable]) if usable else [], strict=True))  # type: ignore[misc]
    late = Fate.TRAINED if train_without_signal or any(values.values()) else Fate.ZERO_VARIANCE
    trajectories = tuple(
        replace(trajectory, advantage=values.get(index), fate=fates[index] or late) for index, trajectory in enumerate(group.trajectories)
    )
    return replace(group, trajectories=trajectories)


def _early_fate(trajectory: Trajectory, drop_truncated: bool) -> Fate | None:
    """The fate of a trajectory that cannot enter its group's baseline, else None."""
    if trajectory.finish_reason in ("error", "abort"):  # nothing carries an unfinished response into the next iteration yet
        return Fate.ENGINE_LOST
    if trajectory.finish_reason == "length" and drop_truncated:
        return Fate.TOO_LONG
    return Fate.REWARD_FAILED if trajectory.reward is None else None


def _sequences(group: Group) -> list[TokenSequence]:
    """What can be trained on; of a group that is not, which serves the parity probe only, everything that was sampled."""
    probe = not is_trained(group)
    return [_sequence(group.problem, t) for t in group.trajectories if t.token_ids and (probe or t.advantage is not None)]


def _sequence(problem: Problem, trajectory: Trajectory) -> TokenSequence:
    """Prompt and response; the responses to a problem share its image objects, so that a pack encodes each image once."""
    prompt = problem.prompt_ids
    response = np.arange(len(prompt) + len(trajectory.token_ids)) >= len(prompt)
    return TokenSequence(
        token_ids=np.asarray([*prompt, *trajectory.token_ids], dtype=np.int64),
        loss_mask=response,
        advantage=float(trajectory.advantage or 0.0),
        rollout_logprobs=np.asarray([0.0] * len(prompt) + list(trajectory.logprobs), dtype=np.float32),
        images=problem.patches,
        image_positions=np.asarray(problem.image_positions, dtype=np.int64) if problem.patches else None,
    )
