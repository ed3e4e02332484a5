"""Packing: which sequences share a micro-batch, and what the tensors of one hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bregman.data.packing import pack
from bregman.types import Sequence


def sequences(lengths: list[int], *, logprobs: bool = False) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(
            token_ids=rng.integers(1, 50, n),
            loss_mask=np.arange(n) >= max(n // 2, 1),
            advantage=float(index),
            rollout_logprobs=rng.normal(size=n).astype(np.float32) if logprobs else None,
        )
        for index, n in enumerate(lengths)
    ]


def test_every_sequence_is_laid_out_once_and_unchanged() -> None:
    given = sequences([5, 9, 3, 7, 2, 8], logprobs=True)
    seen = []
    for batch in pack(given, token_budget=12, normalizer=3.0, temperature=0.7):
        assert batch.num_tokens <= 12
        assert (batch.normalizer, batch.temperature) == (3.0, 0.7)
        for row, index in enumerate(batch.sequence_index.tolist()):
            start, end = batch.boundaries[row : row + 2].tolist()
            assert batch.token_ids[start:end].tolist() == given[index].token_ids.tolist()
            assert batch.loss_mask[start:end].tolist() == given[index].loss_mask.tolist()
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            assert batch.rollout_logprobs is not None
            assert batch.rollout_logprobs[start:end].tolist() == given[index].rollout_logprobs.tolist()
            assert batch.advantages[row] == given[index].advantage
            seen.append(index)
        assert int(batch.boundaries[-1]) == batch.num_tokens
    assert sorted(seen) == list(range(6))


def test_dtypes_are_as_the_types_promise() -> None:
    (batch,) = pack(sequences([4, 3]), token_budget=100, normalizer=1.0)
    assert batch.token_ids.dtype == batch.position_ids.dtype == batch.sequence_index.dtype == torch.int64
    assert (batch.boundaries.dtype, batch.loss_mask.dtype, batch.advantages.dtype) == (torch.int32, torch.bool, torch.float32)
    assert batch.rollout_logprobs is None


def test_a_sequence_beyond_the_budget_gets_a_micro_batch_of_its_own() -> None:
    batches = pack(sequences([30, 4, 4]), token_budget=10, normalizer=1.0)
    assert {(batch.num_tokens, batch.num_sequences) for batch in batches if batch.num_tokens > 10} == {(30, 1)}
    assert all(-1 not in batch.sequence_index for batch in batches)
    assert len(batches) <= 3


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (3, 2), (9, 4), (2, 3)])
def test_micro_batches_come_in_multiples_of_the_ranks(count: int, ranks: int) -> None:
    batches = pack(sequences([6] * count, logprobs=True), token_budget=12, normalizer=1.0, num_ranks=ranks)
    assert len(batches) % ranks == 0
    fillers = [batch for batch in batches if batch.sequence_index.tolist() == [-1]]
    assert len(fillers) == max(-count % ranks, 0) if count < ranks else len(fillers) < ranks
    assert all(not filler.loss_mask.any() and filler.rollout_logprobs is not None for filler in fillers)


def test_ranks_get_equal_work() -> None:
    lengths = np.random.default_rng(1).integers(20, 200, 64).tolist()
    batches = pack(sequences(lengths), token_budget=100_000, normalizer=1.0, num_ranks=2)
    assert len(batches) == 2
    assert abs(batches[0].num_tokens - batches[1].num_tokens) < 100


def test_micro_batches_are_about_as_few_as_can_be() -> None:
    lengths = np.random.default_rng(2).integers(10, 60, 200).tolist()
    assert len(pack(sequences(lengths), token_budget=512, normalizer=1.0)) <= -(-sum(lengths) // 512) + 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "nothing to pack"),
        ([Sequence(token_ids=np.arange(3), loss_mask=np.array([True, False, False]))], "first token"),
        ([Sequence(token_ids=np.arange(3), loss_mask=np.zeros(2, bool))], "loss mask of 2"),
        ([*sequences([3]), *sequences([3], logprobs=True)], "rollout_logprobs"),
    ],
)
def test_malformed_sequences_are_refused(broken: list[Sequence], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(broken, token_budget=10, normalizer=1.0)
    with pytest.raises(ValueError, match="normalizer"):
        pack(sequences([3]), token_budget=10, normalizer=0.0)
