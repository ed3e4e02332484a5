"""Another rotary base and window: what a model folder says, what a learner and an export make of it, when the engine starts anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from bregman.engines.config import AdamWConfig, EngineConfig, LearnerConfig, ModelTraining
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.errors import DataError
from bregman.models.rope import differ, extended, rope_of
from recipes import workers as workers_module
from recipes.workers import Workers

SMALL = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 64, "head_dim": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}),
        ({"text_config": {"rope_theta": 1e4}, "rope_theta": 7}, {"text_config": {"rope_theta": 5e5}, "rope_theta": 7}),
    ],
)
def test_the_base_is_changed_wherever_it_is_written(config: dict, expected: dict, tmp_path: Path) -> None:
    source = write(tmp_path / "source", config)
    (source / "model.safetensors").write_text("weights")
    made = extended(source, tmp_path / "made", theta=5e5, positions=None)
    assert json.loads((made / "config.json").read_text()) == expected
    assert (made / "model.safetensors").read_text() == "weights"
    assert json.loads((source / "config.json").read_text()) == config
    assert differ(source, made) and rope_of(made)[0] == 5e5
    assert extended(made, tmp_path / "again", theta=5e5, positions=None) == made
    assert extended(source, tmp_path / "made", theta=6e5, positions=None) == made  # a stage that starts again
    assert rope_of(made)[0] == 6e5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_models_without_one_base_are_refused(tmp_path: Path) -> None:
    several = write(tmp_path / "several", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})
    for folder, found in ((several, "several rotary bases"), (write(tmp_path / "none", {}), "names no base"), (tmp_path, "cannot be read")):
        with pytest.raises(DataError, match=found):
            extended(folder, tmp_path / "made", theta=5e5, positions=None)
    assert not differ(tmp_path / "none", write(tmp_path / "default", {"rope_theta": 1e4}))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_stage_trains_and_exports_the_new_base(model: Path, process_group: None, tmp_path: Path) -> None:
    start = extended(model, tmp_path / "start", theta=5e5, positions=256)
    learner = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="another rotary base"):
        learner.begin_stage(model, AdamWConfig(learning_rate=1e-3), training=ModelTraining(rope_theta=5e5))
    learner.begin_stage(start, AdamWConfig(learning_rate=1e-3), training=ModelTraining(rope_theta=5e5, max_position_embeddings=256))
    frequencies = learner._sharded.policy.model.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 5e5 ** -(torch.arange(0, 8, 2) / 8))
    learner.export(tmp_path / "exported")
    assert rope_of(tmp_path / "exported") == (5e5, 256)
    config = AutoConfig.from_pretrained(tmp_path / "exported")
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (5e5, 256)


def test_the_engine_starts_anew_for_another_base(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Path, int]] = []
    closed: list[int] = []

    def start(folder: Path, engine: EngineConfig, *_: Any, **__: Any) -> Any:
        started.append((folder, engine.max_model_len))
        return SimpleNamespace(ready=lambda: None, close=lambda: closed.append(len(started)))

    monkeypatch.setattr(workers_module.cluster, "start", lambda _: None)
    monkeypatch.setattr(workers_module.cluster, "stop", lambda: None)
    monkeypatch.setattr(workers_module.RolloutWorkers, "start", start)
    monkeypatch.setattr(workers_module, "end_token_ids", lambda _: ())
    recipe: Any = SimpleNamespace(cluster=SimpleNamespace(address="local"), engine=EngineConfig(max_model_len=128))
    tracker: Any = SimpleNamespace(waiting_for=lambda _: None, warn=print)
    longer = extended(model, tmp_path / "start", theta=5e5, positions=256)
    with Workers(recipe, model, None, tracker, learner=False) as made:
        first = made.engine
        made.use_model(extended(model, tmp_path / "same", theta=None, positions=None))
        assert made.engine is first and not closed
        made.use_model(longer)
        assert closed == [1]
        assert made.engine is not first
        made.use_model(longer)
        assert len(started) == 2
    assert started == [(model, 64), (longer, 128)]  # the window of the model bounds the engine's
