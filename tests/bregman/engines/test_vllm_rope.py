"""A real vLLM engine built from an extended folder samples with the new rotary base, as the learner sees it, also after a sync."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, EngineConfig, SamplingConfig
from bregman.engines.rollout_workers import RolloutWorkers
from bregman.models.loading import load_policy
from bregman.models.rope import extended
from bregman.models.tiny.tokenizer import character_tokenizer
from bregman.types import Problem


@pytest.mark.slow
def test_engine_and_learner_agree_on_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=64, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = tmp_path / "model"
    Qwen3ForCausalLM(config).float().save_pretrained(model)
    start = extended(model, tmp_path / "start", theta=50.0, positions=256)
    settings = ClusterConfig(start_timeout=250, step_timeout=120)
    tokenizer = character_tokenizer("".join(map(chr, range(33, 97))))
    cluster.start(settings)
    try:
        engine = EngineConfig(max_model_len=192, max_num_seqs=8, kv_cache_mib=4, max_num_batched_tokens=512)
        workers = RolloutWorkers.start(start, engine, settings, tokenizer=tokenizer, stop_token_ids=())
        workers.load_weights(model, 0)  # the weights are the same under either base
        problem = Problem(id="p", messages=(), prompt_ids=tuple(4 + 7 * i % 60 for i in range(90)))
        (group,) = workers.rollout([problem], SamplingConfig(num_samples=1, max_tokens=60), seed=0)
        workers.close()
    finally:
        cluster.stop()
    (trajectory,) = group.trajectories
    sampled = torch.tensor(trajectory.logprobs)
    differences = []
    for folder in (start, model):
        ids = torch.tensor([*problem.prompt_ids, *trajectory.token_ids])
        boundaries = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            logprobs = load_policy(folder)(ids, torch.arange(len(ids)), boundaries)[-len(sampled) :]
        differences.append(float((logprobs - sampled).abs().max()))
    assert differences[0] < 1e-5 < 1e-2 < differences[1]
