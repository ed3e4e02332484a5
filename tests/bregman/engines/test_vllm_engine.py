"""Rollouts on real vLLM workers: log-probs, repeatability, seeds, finish reasons, lost workers, bad input."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bregman.engines import cluster, rollout_workers
from bregman.engines.config import ClusterConfig, EngineConfig, SamplingConfig
from bregman.engines.rollout_workers import RolloutWorkers
from bregman.engines.vllm_engine import GenerationRequest
from bregman.engines.weight_sync import SharedMemoryWriter
from bregman.errors import ClusterError, RecipeError, UserError
from bregman.types import Problem, Segment

END = 3
# Small on purpose: 64 cache blocks of 128 tokens, and prefills of at most 512 tokens at once.
ENGINE = EngineConfig(max_model_len=192, max_num_seqs=64, kv_cache_mib=4, max_num_batched_tokens=512)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<think>": 1, "</think>": 2, "<|im_end|>": END, **{f"w{i}": i for i in range(64) if i not in (1, 2, END)}}
    template = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    model = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", chat_template=template)


@pytest.fixture(scope="module")
def workers(model, tokenizer, tmp_path_factory):
    """Two workers with the weights of `model` as policy version 7."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    config = ClusterConfig(rollout_workers=2, start_timeout=120, step_timeout=120)
    cluster.start(config)
    workers = RolloutWorkers.start(folder, ENGINE, config, tokenizer=tokenizer, stop_token_ids=(END,))
    workers.ready()
    workers.load_weights(folder, 7)
    yield workers
    workers.close()
    cluster.stop()


def problems(count: int = 5) -> list[Problem]:
    return [Problem(id=f"p{i}", messages=(), prompt_ids=tuple(4 + (5 * i + 3 * j) % 60 for j in range(6 + i))) for i in range(count)]


def learner_logprobs(model, prompt_ids, token_ids, temperature: float) -> torch.Tensor:
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    with torch.no_grad():
        logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
    start = len(prompt_ids)
    return logprobs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(workers, model, temperature):
    groups = workers.rollout(problems(), SamplingConfig(num_samples=4, max_tokens=48, temperature=temperature), seed=1)
    for group in groups:
        for trajectory in group.trajectories:
            expected = learner_logprobs(model, group.problem.prompt_ids, trajectory.token_ids, temperature)
            assert (expected - torch.tensor(trajectory.logprobs)).abs().max() < 1e-5


def test_groups_come_in_order_and_complete(workers):
    groups = workers.rollout(problems(), SamplingConfig(num_samples=3, max_tokens=10), seed=1)
    assert [group.problem for group in groups] == problems()
    for group in groups:
        assert [t.sample_index for t in group.trajectories] == [0, 1, 2]
        for trajectory in group.trajectories:
            assert trajectory.problem_id == group.problem.id
            assert len(trajectory.token_ids) == len(trajectory.logprobs) > 0
            assert trajectory.segments == (Segment(policy_version=7, length=len(trajectory.token_ids)),)
    assert workers.last_stats["tokens"] == sum(len(t.token_ids) for g in groups for t in g.trajectories)


def test_every_response_has_its_own_repeatable_stream(workers):
    sampling = SamplingConfig(num_samples=6, max_tokens=32)
    first = workers.rollout(problems(), sampling, seed=1)
    assert workers.rollout(problems(), sampling, seed=1) == first
    responses = [t.token_ids for group in first for t in group.trajectories]
    assert len(set(responses)) == len(responses)
    other = workers.rollout(problems(), sampling, seed=2)
    assert not {t.token_ids for group in other for t in group.trajectories} & set(responses)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"), [(100, 10), (10, 170)], ids=["prefill budget exceeded", "cache too small for all"]
)
def test_seeded_responses_survive_a_crowded_engine(workers, prompt_tokens, max_tokens):
    """vLLM on a CPU cannot prefill part of a seeded request, which happens when prompts or preempted responses exceed a budget."""
    crowd = [Problem(id=f"c{i}", messages=(), prompt_ids=tuple(4 + (i + j) % 60 for j in range(prompt_tokens))) for i in range(64)]
    sampling = SamplingConfig(num_samples=2, max_tokens=max_tokens)
    groups = workers.rollout(crowd, sampling, seed=1)
    assert sum(len(group.trajectories) for group in groups) == 128
    assert workers.rollout(crowd, sampling, seed=1) == groups


def test_a_problem_drawn_twice_gets_other_samples(workers):
    first, second = workers.rollout([problems()[0]] * 2, SamplingConfig(num_samples=4, max_tokens=32), seed=1)
    assert not {t.token_ids for t in first.trajectories} & {t.token_ids for t in second.trajectories}


def test_finish_reasons_and_text(workers, tokenizer):
    groups = workers.rollout(problems(12), SamplingConfig(num_samples=8, max_tokens=40), seed=3)
    trajectories = [t for group in groups for t in group.trajectories]
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for trajectory in trajectories:
        words = tokenizer.convert_ids_to_tokens(list(trajectory.token_ids))
        if trajectory.finish_reason == "stop":
            assert trajectory.token_ids[-1] == END and END not in trajectory.token_ids[:-1]
            words = words[:-1]
        else:
            assert len(trajectory.token_ids) == 40 and END not in trajectory.token_ids
        assert trajectory.text.split() == words
    assert any("<think>" in t.text for t in trajectories)


def test_loops_are_stopped_if_asked(workers):
    """Greedy decoding of a random model runs into a loop."""
    settings = {"num_samples": 1, "max_tokens": 160, "temperature": 0.0}
    plain = workers.rollout(problems(16), SamplingConfig(**settings), seed=0)
    stopped = workers.rollout(problems(16), SamplingConfig(**settings, stop_on_repetition=True), seed=0)
    reasons = [group.trajectories[0].finish_reason for group in stopped]
    assert "repetition" in reasons
    for before, after in zip(plain, stopped, strict=True):
        long, short = before.trajectories[0], after.trajectories[0]
        assert long.finish_reason != "repetition" and long.token_ids[: len(short.token_ids)] == short.token_ids
        if short.finish_reason == "repetition":
            assert len(short.token_ids) < len(long.token_ids)
            assert any(short.token_ids[-6 * n :] == short.token_ids[-n:] * 6 for n in range(4, 65))


def test_a_response_can_be_continued(workers, model):
    """Prompt plus response so far gives the same log-probs as sampling it in one go."""
    prompt, actor = problems()[0].prompt_ids, workers._workers[0]
    start = GenerationRequest(prompt_ids=prompt, max_tokens=8, seed=1)
    (first,), _ = cluster.wait([actor.generate.remote([start])], what="first half", timeout=60)[0]
    rest = GenerationRequest(prompt_ids=prompt, prefix_ids=first.token_ids, max_tokens=12, seed=2)
    (second,), _ = cluster.wait([actor.generate.remote([rest])], what="second half", timeout=60)[0]
    assert len(second.token_ids) == 12
    expected = learner_logprobs(model, prompt, first.token_ids + second.token_ids, 1.0)
    assert (expected - torch.tensor(first.logprobs + second.logprobs)).abs().max() < 1e-5


def test_a_prompt_that_does_not_fit_is_named(workers):
    long = Problem(id="long-one", messages=(), prompt_ids=tuple([5] * 100))
    with pytest.raises(RecipeError, match=r"problem long-one: prompt \(100 tokens\) plus max_tokens \(93\) .* set max_tokens <= 92"):
        workers.rollout([*problems(), long], SamplingConfig(num_samples=1, max_tokens=93), seed=0)
    with pytest.raises(UserError, match=r"request 0: prompt"):  # raised inside a worker, arrives as it is
        request = GenerationRequest(prompt_ids=long.prompt_ids, max_tokens=93)
        cluster.wait([workers._workers[0].generate.remote([request])], what="generate", timeout=60)


class PublishedWeights:
    """A learner as far as the rollout engine is concerned."""

    def __init__(self, model) -> None:
        self.writer, self.model = SharedMemoryWriter(), model

    def publish_weights(self, engine_dtype):
        return self.writer.write(self.model.named_parameters())


def kill(workers: RolloutWorkers, index: int) -> None:
    os.kill(ray.get(workers._workers[index].process_id.remote()), signal.SIGKILL)


def test_a_killed_worker_is_replaced_with_the_weights_last_loaded(workers, model, tmp_path):
    torch.manual_seed(5)
    changed = Qwen3ForCausalLM(model.config).float().eval()
    learner = PublishedWeights(changed)
    timings = workers.load_weights(learner, 8)
    assert set(timings) == {"publish", "relay", "load", "caches", "total"}
    sampling = SamplingConfig(num_samples=4, max_tokens=32)
    before = workers.rollout(problems(), sampling, seed=1)
    notes: list[str] = []
    workers.on_note = notes.append
    kill(workers, 1)
    after = workers.rollout(problems(), sampling, seed=1)
    assert after == before
    assert after[0].trajectories[0].segments[0].policy_version == 8
    assert workers.last_stats["replaced_workers"] == 1
    assert len(notes) == 1 and "rollout worker 1: generate: the worker died" in notes[0]
    learner.writer.close()


def test_a_worker_that_keeps_dying_ends_the_run(workers, monkeypatch):
    monkeypatch.setattr(rollout_workers, "MAX_REPLACEMENTS", 0)
    kill(workers, 1)
    with pytest.raises(ClusterError, match="rollout worker 1: generate: the worker died"):
        workers.rollout(problems(), SamplingConfig(num_samples=1, max_tokens=4), seed=1)


def test_a_folder_without_weights_is_named(workers, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no \\*.safetensors file in this folder"):
        workers.load_weights(tmp_path, 9)
    broken = RolloutWorkers.start(Path(tmp_path), ENGINE, ClusterConfig(), tokenizer=tokenizer, stop_token_ids=(END,))
    with pytest.raises(UserError, match="no \\*.safetensors file in this folder"):
        broken.ready()
    broken.close()
