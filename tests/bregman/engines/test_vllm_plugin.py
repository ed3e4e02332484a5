"""What the vLLM plugin registers, and that each workaround of a vLLM bug is right and still needed."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

from bregman.engines import vllm_engine, vllm_plugin
from bregman.engines.config import EngineConfig
from bregman.engines.vllm_engine import GenerationRequest, VLLMEngine
from bregman.engines.weight_sync import folder_handle
from bregman.models.vision import load_image_encoder

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kimi_vl_parity as parity  # noqa: E402

NEEDLESS = "vLLM no longer has this bug: remove the workaround from bregman/engines/vllm_plugin.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parity.write_model(parity.MODELS["tiny"], 0, tmp_path_factory.mktemp("kimi_vl") / "model")


@pytest.fixture(scope="module")
def engine(folder):
    return VLLMEngine(str(folder), EngineConfig(**parity.ENGINE))


def test_vllms_own_chat_sends_the_learners_prompt_and_patches(folder):
    """What `vllm serve` does with a folder: its tokenizer, chat template and image processing, without remote code."""
    from transformers import AutoTokenizer
    from vllm import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.params import ChatParams

    encoder = load_image_encoder(folder)
    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=256, mm_processor_cache_gb=0).create_engine_config()
    renderer = renderer_from_config(config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8))
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "how many?"}]
    ((_,), (prompt,)) = renderer.render_chat(
        [[{"role": "user", "content": content}]], ChatParams(chat_template_kwargs={"add_generation_prompt": True})
    )
    patches = encoder.encode(image)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    place = ids.index(encoder.placeholder_id)
    assert prompt["prompt_token_ids"] == ids[:place] + [encoder.placeholder_id] * patches.num_tokens + ids[place + 1 :]
    sent = prompt["mm_kwargs"]["image"][0].get_data()
    assert np.array_equal(sent["pixel_values"].numpy(), patches.pixels) and sent["image_grid_hws"].tolist() == list(patches.grid)


def test_the_plugin_names_what_exists_and_loads_nothing_early():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]["bregman"]
    module, _, function = declared.partition(":")
    assert getattr(import_module(module), function) is vllm_plugin.register
    from vllm import ModelRegistry

    registered = ModelRegistry.models[vllm_plugin.ARCHITECTURE]
    assert registered.module_name == "bregman.engines.vllm_kimi_vl"  # a name: processes that serve another model never import it


def test_the_rotary_workaround_is_needed_and_right(engine):
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    model = parity.vllm_model(engine)
    rotary = next(module for module in model.modules() if isinstance(module, RotaryEmbedding))
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(5, heads, rotary.head_size, generator=random) for heads in (4, 1))
    expected, _ = rotary.forward_native(torch.arange(5), query.clone(), key.clone())
    mended, _ = RotaryEmbedding.forward_cpu(rotary, torch.arange(5), query.clone(), key.clone())
    kernel, _ = RotaryEmbedding.forward_cpu.__wrapped__(rotary, torch.arange(5), query.clone(), key.clone())
    assert torch.allclose(mended, expected, atol=1e-6)
    assert not torch.allclose(kernel, expected, atol=1e-2), NEEDLESS


def test_the_expert_workaround_is_needed_and_right(engine, folder, monkeypatch):
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    requests = [GenerationRequest(prompt_ids=(1, 2, 3), max_tokens=4, temperature=0)]
    fresh = engine.generate(requests)
    with monkeypatch.context() as patch:
        patch.setattr(Method, "_setup_kernel", Method._setup_kernel.__wrapped__)
        engine.load_weights(folder_handle(folder), 1)
    assert engine.generate(requests) != fresh, NEEDLESS
    engine.load_weights(folder_handle(folder), 2)
    assert engine.generate(requests) == fresh


def test_the_tied_head_workaround_is_needed_and_right(tmp_path, monkeypatch):
    folders = [_tied_model(seed, tmp_path / str(seed)) for seed in (0, 1)]
    engine = VLLMEngine(str(folders[0]), EngineConfig(max_model_len=32, kv_cache_mib=4))
    requests = [GenerationRequest(prompt_ids=(1, 2, 3), max_tokens=4, temperature=0)]
    fresh = engine.generate(requests)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_plugin, "repack_tied_head", lambda _: 0)
        engine.load_weights(folder_handle(folders[1]), 1)
        engine.load_weights(folder_handle(folders[0]), 2)
        back = engine.generate(requests)
        engine.load_weights(folder_handle(folders[1]), 3)
        stale = engine.generate(requests)
    engine.load_weights(folder_handle(folders[1]), 4)
    assert engine.generate(requests) != stale, NEEDLESS
    engine.load_weights(folder_handle(folders[0]), 5)
    assert engine.generate(requests) == fresh == back


def _tied_model(seed: int, folder: Path) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "disabled"),
    [
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, False),  # the CPU kernel's size
        ({"kv_lora_rank": 32, "qk_rope_head_dim": 16}, True),
        ({"hidden_size": 64}, False),  # no latent attention at all
    ],
)
def test_latent_attention_is_off_where_the_cpu_kernel_lacks_the_size(tmp_path, text, disabled):
    for config in ({"text_config": text}, text):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert vllm_engine.latent_attention(tmp_path) == ({"VLLM_MLA_DISABLE": "1"} if disabled and not torch.cuda.is_available() else {})
