"""Checkpoint folders that are damaged, foreign or cannot be written: one line, and the learner goes on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from learner_cases import OPTIMIZER, make_model, minibatch, policy_loss

from bregman.engines import checkpoint
from bregman.engines.config import LearnerConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def learner(tmp_path: Path) -> FSDP2Learner:
    made = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    made.begin_stage(make_model(tmp_path / "model"), OPTIMIZER)
    made.step(minibatch(), policy_loss, 1e-2)
    return made


def test_restores_optimizer_and_random_state(learner: FSDP2Learner, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.manual_seed(3)
    learner.save_checkpoint(folder)
    names = [name for name, _ in learner._sharded.policy.named_parameters()]
    moments = [tensor.clone() for name in names for tensor in learner._optimizer.state(name).values()]
    drawn = torch.rand(3)
    learner.begin_iteration([minibatch()])
    assert learner._optimizer.steps == 0
    learner.load_checkpoint(folder)
    assert learner._optimizer.steps == 1
    assert all(torch.equal(*pair) for pair in zip(moments, [t for n in names for t in learner._optimizer.state(n).values()], strict=True))
    assert max(tensor.abs().max() for tensor in moments) > 0
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("damage", ["empty", "no_data", "cut"])
def test_a_damaged_checkpoint_is_a_user_error(learner: FSDP2Learner, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.save_checkpoint(folder)
    for file in folder.iterdir():
        if damage == "empty" or (damage == "no_data" and file.suffix == ".distcp"):
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read"):
        learner.load_checkpoint(folder)


def test_a_checkpoint_of_another_model_is_a_user_error(learner: FSDP2Learner, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.save_checkpoint(folder)
    learner.begin_stage(make_model(tmp_path / "deeper", layers=3), OPTIMIZER)
    with pytest.raises(DataError, match="cannot be read"):
        learner.load_checkpoint(folder)


def test_no_space_left_is_a_user_error_and_keeps_the_old_export(
    learner: FSDP2Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "exported"
    learner.export(target)
    before = (target / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    with pytest.raises(DataError, match="No space left"):
        learner.export(target)
    assert (target / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".exported*"))


def test_an_export_that_cannot_be_written_is_a_user_error(learner: FSDP2Learner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        learner.export(tmp_path / "file" / "exported")
