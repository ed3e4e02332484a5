"""Conversations of a row never see each other: loss and gradient of full rows equal those of every conversation by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_cases import make_model

from bregman.data.mixture import Mixture
from bregman.data.packing import pack_rows
from bregman.data.rows import RowFiller
from bregman.models.loading import load_policy
from bregman.types import PackedBatch, Sequence
from sft.loss import sft_loss


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory):
    return load_policy(make_model(Path(tmp_path_factory.mktemp("model"))))


def gradients(policy, batches: list[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    policy.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = sft_loss(policy(batch.token_ids, batch.position_ids, batch.boundaries, batch.temperature), batch)
        loss.backward()
        total += loss.item()
    return total, {name: tensor.grad.clone() for name, tensor in policy.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_full_rows_equal_single_conversations(policy, num_ranks):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 0.8, 200).astype(int), 4, 60)
    examples = [Sequence(token_ids=rng.integers(0, 8, n), loss_mask=np.arange(n) >= max(n // 3, 1)) for n in lengths]
    filler = RowFiller(Mixture([200], [1.0], 0).draws, lambda draw: int(lengths[draw.row]))
    rows = [[examples[draw.row] for draw in row] for row in filler.step(96, 3)]
    assert sum(len(example.token_ids) for row in rows for example in row) > 0.99 * 3 * 96
    trained = float(sum(example.loss_mask.sum() for row in rows for example in row))
    packed = pack_rows(rows, normalizer=trained, num_ranks=num_ranks)
    assert len(packed) == (3 if num_ranks == 1 else 4)  # a filler makes up the ranks
    alone = pack_rows([[example] for row in rows for example in row], normalizer=trained)
    loss, gradient = gradients(policy, packed)
    expected_loss, expected = gradients(policy, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
    broken = [batch_without_boundaries(batch) for batch in packed]
    assert gradients(policy, broken)[0] != pytest.approx(expected_loss, rel=1e-6)  # the test can fail


def batch_without_boundaries(batch: PackedBatch) -> PackedBatch:
    return replace(batch, boundaries=torch.tensor([0, batch.num_tokens], dtype=torch.int32), position_ids=torch.arange(batch.num_tokens))
