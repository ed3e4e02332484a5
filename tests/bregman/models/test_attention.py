"""Packed models against the same models run plainly, sequence by sequence: log-probabilities, gradients, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from bregman.errors import DataError
from bregman.models import logprobs as logprobs_module
from bregman.models.attention import varlen_attention
from bregman.models.loading import load_policy, resolve_model
from bregman.models.logprobs import token_logprobs
from bregman.models.policy import PolicyModel

LENGTHS = (7, 1, 12, 5, 20)
SMALL = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
ARCHITECTURES = {
    "qwen3": Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    "grouped_heads": Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "llama": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=1),
    "sliding_window": MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=6),
}


def make(folder: Path, config: object) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def packed_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_ids = torch.randint(0, 31, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return token_ids, torch.cat([torch.arange(n) for n in LENGTHS]), boundaries


def alone(model: torch.nn.Module, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    pieces = []
    for ids in token_ids.split(LENGTHS):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        chosen = log_softmax(logits[:-1] / temperature, -1).gather(1, ids[1:, None])[:, 0]
        pieces.append(torch.cat([torch.zeros(1), chosen]))
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_each_sequence_alone(name: str, temperature: float, tmp_path: Path) -> None:
    folder = make(tmp_path, ARCHITECTURES[name])
    policy, plain = load_policy(folder), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    token_ids, positions, boundaries = packed_inputs()
    packed, expected = policy(token_ids, positions, boundaries, temperature), alone(plain, token_ids, temperature)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    assert packed[boundaries[:-1].long()].abs().max() == 0

    weights = torch.randn(len(packed), generator=torch.Generator().manual_seed(2))
    (packed * weights).sum().backward()
    (expected * weights).sum().backward()
    reference = dict(plain.named_parameters())
    for key, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[key].grad, atol=1e-4, rtol=1e-4)


def test_chunked_log_probabilities_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(make(tmp_path, ARCHITECTURES["qwen3"]))
    whole = policy(*packed_inputs())
    whole.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", 0)
    monkeypatch.setattr(logprobs_module, "CPU_BLOCK", (8, 9))
    chunked = policy(*packed_inputs())
    chunked.square().sum().backward()
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0)
    for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


def test_token_logprobs_of_uniform_logits() -> None:
    boundaries = torch.tensor([0, 2, 3], dtype=torch.int32)
    result = token_logprobs(torch.zeros(3, 4), torch.tensor([1, 2, 3]), boundaries)
    torch.testing.assert_close(result, torch.tensor([0.0, -torch.tensor(4.0).log(), 0.0]))


@pytest.mark.parametrize(
    "change",
    [{"cu_seq_lens_q": None}, {"attention_mask": torch.ones(1)}, {"softcap": 30.0}, {"is_causal": False}, {"s_aux": torch.ones(2)}],
)
def test_what_it_cannot_compute_is_refused(change: dict) -> None:
    tensor = torch.randn(1, 2, 4, 8)
    arguments = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4]), **change}
    with pytest.raises(ValueError, match="cannot run on packed sequences"):
        varlen_attention(torch.nn.Module(), tensor, tensor, tensor, **arguments)


def test_cost_is_the_sum_of_squares(tmp_path: Path) -> None:
    """512 sequences of 16 are 8192 tokens: the square of the pack would need 256 MiB per head and layer."""
    shapes: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        shapes.append(query.shape[2])
        return original(query, *rest, **options)

    tensor = torch.randn(1, 2, 8192, 4)
    boundaries = torch.arange(0, 8193, 16, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bregman.models.attention.scaled_dot_product_attention", spy)
        varlen_attention(torch.nn.Module(), tensor, tensor, tensor, None, cu_seq_lens_q=boundaries)
    assert sum(n * n for n in shapes) == 512 * 16**2


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig

    config = GraniteConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, logits_scaling=8.0)
    with pytest.raises(DataError, match="other log-probabilities packed than alone"):
        load_policy(make(tmp_path, config))


def test_model_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_policy(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(DataError, match="not readable as JSON"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="model_type"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **SMALL, "num_attention_heads": 4}))
    with pytest.raises(DataError, match="cannot be loaded|can be loaded"):
        load_policy(tmp_path)  # no weights


def test_remote_code_is_refused_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "was_run"
    (tmp_path / "modeling_own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(DataError, match="can be loaded"):
        load_policy(tmp_path)
    assert not trap.exists()


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="no such folder"):
        resolve_model(str(tmp_path / "missing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="not in the local cache"):
        resolve_model("nobody/no-such-model")


def test_dropout_is_off(tmp_path: Path) -> None:
    policy = load_policy(make(tmp_path, ARCHITECTURES["qwen3"]))
    assert isinstance(policy, PolicyModel)
    policy.train()
    assert torch.equal(policy(*packed_inputs()), policy(*packed_inputs()))
