"""One rank of the learner on gloo: the same numbers as a plain padded torch loop, however the batch is cut; bits repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learner_cases import LENGTHS, OPTIMIZER, make_model, make_sequences, minibatch, nan_loss, padded_loop, policy_loss, reference_loss
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, Qwen3MoeConfig

from bregman.data.packing import pack
from bregman.engines import sharding
from bregman.engines.config import LearnerConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.engines.weight_sync import read_tensors
from bregman.errors import DataError, UserError

RATE = OPTIMIZER.learning_rate


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def learner(model: Path, *, fixed: bool = False, **settings: Any) -> FSDP2Learner:
    made = FSDP2Learner(LearnerConfig(**settings), rank=0, world_size=1, device=torch.device("cpu"))
    made.begin_stage(model, OPTIMIZER, keep_fixed_reference=fixed)
    return made


def weights(made: FSDP2Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made._sharded.full_weights(keep=True).items()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_equals_a_plain_padded_loop(model: Path) -> None:
    made = learner(model)
    stats = [made.step(minibatch(seed=step), policy_loss, RATE) for step in range(4)]
    trace, expected = padded_loop(model, 4)
    assert (stats[0].loss, stats[0].grad_norm) == pytest.approx(trace[0], rel=1e-6)
    assert [(s.loss, s.grad_norm) for s in stats] == [pytest.approx(pair, rel=1e-5) for pair in trace]
    assert min(norm for _, norm in trace) > OPTIMIZER.max_grad_norm  # clipping was at work
    for name, tensor in weights(made).items():
        torch.testing.assert_close(tensor, expected[name], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("budget", [1000, 40, 25])
def test_neither_micro_batches_nor_sharding_change_a_step(
    model: Path, settings: dict, per_layer: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learner(model).step(minibatch(), policy_loss, RATE)
    monkeypatch.setattr(sharding, "SMALL_MODEL", 0 if per_layer else sharding.SMALL_MODEL)
    stats = learner(model, **settings).step(minibatch(token_budget=budget), policy_loss, RATE)
    assert (stats.loss, stats.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)
    assert stats.metrics == pytest.approx(dict(expected.metrics), rel=1e-5)
    assert stats.num_tokens == sum(LENGTHS)


def test_order_of_sequences_does_not_matter(model: Path) -> None:
    sequences = make_sequences()
    stats = [learner(model).step(pack(order, token_budget=45, normalizer=7.0), policy_loss, RATE) for order in (sequences, sequences[::-1])]
    assert stats[0].loss == pytest.approx(stats[1].loss, rel=1e-5)
    assert stats[0].grad_norm == pytest.approx(stats[1].grad_norm, rel=1e-5)


def test_fillers_are_neutral(model: Path) -> None:
    plain, filled = learner(model), learner(model)
    one = minibatch(lengths=[12])
    first = plain.step(one, policy_loss, RATE)
    second = filled.step(minibatch(lengths=[12], num_ranks=3), policy_loss, RATE)
    assert (first.loss, first.grad_norm, first.num_tokens) == (second.loss, second.grad_norm, second.num_tokens)
    assert_same_bits(weights(plain), weights(filled))


def test_activation_checkpointing_gives_the_same_bits(model: Path) -> None:
    plain, recomputing = learner(model), learner(model, activation_checkpointing=True)
    for made in (plain, recomputing):
        made.step(minibatch(token_budget=40), policy_loss, RATE)
    assert_same_bits(weights(plain), weights(recomputing))


def test_activation_checkpointing_holds_less(tmp_path: Path) -> None:
    deep, batch = make_model(tmp_path, layers=8), minibatch()[0]
    held: dict[bool, int] = {}
    for checkpointing in (False, True):
        made, sizes = learner(deep, activation_checkpointing=checkpointing), dict[int, int]()

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = policy_loss(made._forward(made._sharded, batch), batch)
        loss.backward()
        weights = sum(4 * p.numel() for p in made._sharded.policy.parameters())
        held[checkpointing] = sum(sizes.values()) - (0 if checkpointing else weights)  # weights are saved as well
    assert held[True] < held[False] / 4


def test_bfloat16_trains_and_keeps_float32_weights(model: Path) -> None:
    made = learner(model, dtype="bfloat16")
    losses = [made.step(minibatch(), policy_loss, 1e-2).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.float32}
    full = learner(model)
    assert losses[0] == pytest.approx(full.step(minibatch(), policy_loss, RATE).loss, rel=0.05)


def test_the_policy_starts_exactly_at_its_reference(model: Path) -> None:
    made = learner(model, fixed=True)
    made.step(minibatch(seed=5), policy_loss, RATE)
    batches = minibatch(token_budget=40)
    (answers,) = made.begin_iteration([batches])
    batches = [replace(b, reference_logprobs=r, fixed_logprobs=f) for b, (r, f) in zip(batches, answers, strict=True)]
    first, second = (made.step(batches, reference_loss, RATE) for _ in range(2))
    assert first.metrics["from_reference"] == 0
    assert first.metrics["from_fixed"] > 0.05  # it moved before the iteration began
    assert second.metrics["from_reference"] > 0.05


def test_the_fixed_reference_stays(model: Path) -> None:
    made = learner(model, fixed=True)
    before = made.begin_iteration([minibatch()])[0][0][1]
    made.step(minibatch(), policy_loss, RATE)
    after = made.begin_iteration([minibatch()])[0][0][1]
    assert torch.equal(before, after)


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_is_reset_when_asked(model: Path, reset: bool) -> None:
    made = learner(model)
    made.step(minibatch(), policy_loss, RATE)
    made.begin_iteration([minibatch()], reset_optimizer=reset)
    moments = [moment.abs().max() for name, _ in made._sharded.policy.named_parameters() for moment in made._optimizer.state(name).values()]
    assert bool(max(moments) == 0) is reset
    assert made._optimizer.steps == (0 if reset else 1)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(model: Path) -> None:
    made, untouched = learner(model), learner(model)
    with pytest.raises(UserError, match="the loss is nan"):
        made.step(minibatch(token_budget=40), nan_loss, RATE)
    assert_same_bits(weights(made), weights(untouched))
    for each in (made, untouched):
        each.step(minibatch(), policy_loss, RATE)
    assert_same_bits(weights(made), weights(untouched))


def test_the_same_calls_give_the_same_bits(model: Path) -> None:
    runs = [learner(model), learner(model)]
    for made in runs:
        for step in range(3):
            made.step(minibatch(seed=step, token_budget=40), policy_loss, RATE)
    assert_same_bits(*map(weights, runs))


def test_a_resumed_run_gives_the_same_bits(model: Path, tmp_path: Path) -> None:
    undisturbed, resumed = learner(model), learner(model)
    for step in range(2):
        undisturbed.step(minibatch(seed=step), policy_loss, RATE)
    undisturbed.save_checkpoint(tmp_path)
    resumed.begin_iteration([minibatch()])  # gathered weights of before must not survive the load
    resumed.load_checkpoint(tmp_path)
    for made in (undisturbed, resumed):
        for step in range(2, 4):
            made.step(minibatch(seed=step), policy_loss, RATE)
    assert_same_bits(weights(undisturbed), weights(resumed))


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_with_equal_logits(tied: bool, tmp_path: Path) -> None:
    made = learner(make_model(tmp_path / "start", tied=tied))
    made.step(minibatch(), policy_loss, RATE)
    target = tmp_path / "out" / "exported"
    for _ in range(2):  # the second replaces the first
        made.export(target)
    assert [path.name for path in target.parent.iterdir()] == ["exported"]
    assert (target / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    ids = torch.tensor(make_sequences()[3].token_ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(target)(input_ids=ids[None]).logits[0]
    expected = torch.log_softmax(logits / 0.9, -1)[:-1].gather(1, ids[1:, None])[:, 0]
    ((logprobs, _),) = made.begin_iteration([minibatch(lengths=LENGTHS)])[0]
    start = sum(LENGTHS[:3])
    torch.testing.assert_close(logprobs[start + 1 : start + LENGTHS[3]], expected, atol=1e-5, rtol=1e-5)
    again = learner(target)
    assert_same_bits(weights(made), weights(again))


def test_published_weights_are_those_of_the_checkpoint_on_disk(model: Path) -> None:
    made = learner(model)
    made.step(minibatch(), policy_loss, RATE)
    try:
        handle = made.publish_weights()
        assert handle is not None
        assert_same_bits({name: tensor.clone() for name, tensor in read_tensors(handle)}, weights(made))
    finally:
        made.close()
    assert not Path(handle.path).exists()


SMALL_MOE = {
    "vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL_MOE, num_key_value_heads=2, head_dim=8, num_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **SMALL_MOE, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_train_and_keep_their_names_on_disk(name: str, per_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: PreTrainedConfig = EXPERTS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    monkeypatch.setattr(sharding, "SMALL_MODEL", 0 if per_layer else sharding.SMALL_MODEL)
    made = learner(tmp_path / "start")
    assert_same_bits(load_file(tmp_path / "start" / "model.safetensors"), dict(made._sharded.hub_weights(keep=True)))
    made.begin_iteration([minibatch(token_budget=40)])
    losses = [made.step(minibatch(token_budget=40), policy_loss, RATE).loss for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    made.export(tmp_path / "end")
    assert_same_bits(load_file(tmp_path / "end" / "model.safetensors"), dict(made._sharded.hub_weights(keep=True)))


def test_a_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        learner(tmp_path)
