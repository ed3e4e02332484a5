"""Laying token sequences end to end: which sequence goes into which micro-batch, and the tensors of a micro-batch.

Owns the packing of one optimizer step. Which examples make up the step is the loops' business.
"""

from __future__ import annotations

from collections.abc import Sequence as Collection

import numpy as np
import torch

from bregman.types import PackedBatch, Sequence


def pack(
    sequences: Collection[Sequence], *, token_budget: int, normalizer: float, temperature: float = 1.0, num_ranks: int = 1
) -> list[PackedBatch]:
    """Pack the sequences of one optimizer step into micro-batches; the same input gives the same packing.

    Sequences are taken longest first and go to the micro-batch with the fewest tokens that still has room (worst fit, which
    balances the ranks). Rank r of n trains micro-batches r, r + n, r + 2n, ...

    Args:
        sequences: at least one; `PackedBatch.sequence_index` refers to this list.
        token_budget: most tokens of a micro-batch, image tokens included; a longer sequence gets a micro-batch of its own. The
            patches of its distinct images, a few per image token, are encoded on top of it.
        normalizer: what the loss of the whole step is divided by.
        temperature: sampling temperature at which log-probabilities are taken.
        num_ranks: the number of micro-batches is a multiple of it; where sequences are too few, fillers make it up.

    Raises:
        ValueError: no sequences, a malformed one, or a normalizer that is not positive.
    """
    bins = _assign([len(sequence.token_ids) for sequence in sequences], token_budget, num_ranks)
    return _batches(sequences, bins, normalizer, temperature)


def pack_rows(rows: Collection[Collection[Sequence]], *, normalizer: float, num_ranks: int = 1) -> list[PackedBatch]:
    """Micro-batches of rows that are chosen already (`bregman.data.rows`), and fillers up to a multiple of `num_ranks`.

    `PackedBatch.sequence_index` counts the sequences of all rows in order.

    Raises:
        ValueError: as `pack`.
    """
    ends = np.cumsum([len(row) for row in rows]).tolist()
    bins = [list(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]
    bins += [[] for _ in range(-len(bins) % num_ranks)]
    return _batches([sequence for row in rows for sequence in row], bins, normalizer, temperature=1.0)


def _batches(sequences: Collection[Sequence], bins: list[list[int]], normalizer: float, temperature: float) -> list[PackedBatch]:
    if not sequences:
        raise ValueError("nothing to pack: the optimizer step has no sequences")
    if not normalizer > 0:
        raise ValueError(f"the normalizer must be positive, found {normalizer}")
    for index, sequence in enumerate(sequences):
        _check(sequence, index)
    with_logprobs = [sequence.rollout_logprobs is not None for sequence in sequences]
    if any(with_logprobs) != all(with_logprobs):
        raise ValueError("either all sequences of an optimizer step have rollout_logprobs, or none has")
    return [
        _batch([sequences[i] for i in chosen], chosen, normalizer, temperature)
        if chosen
        else _filler(normalizer, temperature, rollout_logprobs=with_logprobs[0])
        for chosen in bins
    ]


def _check(sequence: Sequence, index: int) -> None:
    length = len(sequence.token_ids)
    if length == 0 or len(sequence.loss_mask) != length:
        raise ValueError(f"sequence {index} has {length} tokens and a loss mask of {len(sequence.loss_mask)}")
    if sequence.loss_mask[0]:
        raise ValueError(f"sequence {index}: its first token cannot be a training target, nothing predicts it")
    if sequence.rollout_logprobs is not None and len(sequence.rollout_logprobs) != length:
        raise ValueError(f"sequence {index} has {length} tokens and {len(sequence.rollout_logprobs)} rollout_logprobs")
    placeholders = 0 if sequence.image_positions is None else len(sequence.image_positions)
    features = sum(image.num_tokens for image in sequence.images)
    if placeholders != features:
        raise ValueError(f"sequence {index} has {placeholders} image placeholders and {features} image tokens")


def _assign(lengths: list[int], token_budget: int, num_ranks: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, ascending. Tokens are balanced rather than their squares: up to lengths of
    some multiples of the model's width, the matrix products, linear in tokens, cost more than attention."""
    wanted = min(-(-sum(lengths) // token_budget), len(lengths))
    bins: list[list[int]] = [[] for _ in range(-(-wanted // num_ranks) * num_ranks)]
    loads = [0] * len(bins)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        target = min(range(len(bins)), key=loads.__getitem__)
        if loads[target] and loads[target] + lengths[index] > token_budget:
            target = len(bins)
            bins += [[] for _ in range(num_ranks)]
            loads += [0] * num_ranks
        bins[target].append(index)
        loads[target] += lengths[index]
    filled = [sorted(chosen) for chosen in bins if chosen]  # sequences beyond the budget can leave others empty
    return filled + [[] for _ in range(-len(filled) % num_ranks)]


def _batch(sequences: list[Sequence], indices: list[int], normalizer: float, temperature: float) -> PackedBatch:
    lengths = np.asarray([len(sequence.token_ids) for sequence in sequences])
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    logprobs = [sequence.rollout_logprobs for sequence in sequences if sequence.rollout_logprobs is not None]
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate([sequence.token_ids for sequence in sequences]).astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        loss_mask=torch.from_numpy(np.concatenate([sequence.loss_mask for sequence in sequences]).astype(bool)),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32),
        sequence_index=torch.tensor(indices, dtype=torch.int64),
        normalizer=float(normalizer),
        temperature=temperature,
        rollout_logprobs=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)) if logprobs else None,
        **_images(sequences, boundaries),
    )


def _images(sequences: list[Sequence], boundaries: np.ndarray) -> dict[str, torch.Tensor]:
    """The image fields of a pack: every distinct image (by identity) once, and which of their features each placeholder takes."""
    distinct = list({id(image): image for sequence in sequences for image in sequence.images}.values())
    if not distinct:
        return {}
    ends = np.cumsum([image.num_tokens for image in distinct])
    features = {id(image): np.arange(end - image.num_tokens, end) for image, end in zip(distinct, ends.tolist(), strict=True)}
    shown = [(sequence, start) for sequence, start in zip(sequences, boundaries.tolist(), strict=False) if sequence.images]
    return {
        "pixel_values": torch.from_numpy(np.concatenate([image.pixels for image in distinct])),
        "image_grid": torch.tensor([image.grid for image in distinct], dtype=torch.int64),
        "image_positions": torch.from_numpy(np.concatenate([start + sequence.image_positions for sequence, start in shown])),
        "image_rows": torch.from_numpy(np.concatenate([features[id(image)] for sequence, _ in shown for image in sequence.images])),
    }


def _filler(normalizer: float, temperature: float, *, rollout_logprobs: bool) -> PackedBatch:
    """Two tokens that nothing trains on: a rank without work still has to take part in every collective of the step."""
    return PackedBatch(
        token_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        boundaries=torch.tensor([0, 2], dtype=torch.int32),
        loss_mask=torch.zeros(2, dtype=torch.bool),
        advantages=torch.zeros(1),
        sequence_index=torch.tensor([-1]),
        normalizer=float(normalizer),
        temperature=temperature,
        rollout_logprobs=torch.zeros(2) if rollout_logprobs else None,
    )
