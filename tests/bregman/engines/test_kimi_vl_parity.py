"""Kimi-VL on the real vLLM: log-probs equal the learner's, fresh and after weight syncs; how images reach the engine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bregman.engines.config import EngineConfig
from bregman.engines.vllm_engine import VLLMEngine
from bregman.engines.weight_sync import SharedMemoryWriter, folder_handle
from bregman.errors import ClusterError, RecipeError
from bregman.models.loading import load_policy
from bregman.models.vision import load_image_encoder
from bregman.types import ImagePatches

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import kimi_vl_parity as parity

BOUND = 1e-5  # nats


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one shape: a, which the engine is built from, and b."""
    scratch = tmp_path_factory.mktemp("kimi_vl")
    return [parity.write_model(parity.MODELS["tiny"], seed, scratch / str(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def policies(folders):
    return [load_policy(folder) for folder in folders]


@pytest.fixture(scope="module")
def encoder(folders):
    return load_image_encoder(folders[0])


@pytest.fixture(scope="module")
def requests(encoder):
    return parity.make_requests(encoder, samples=12, max_tokens=16)


@pytest.fixture(scope="module")
def engine(folders):
    return VLLMEngine(str(folders[0]), EngineConfig(**parity.ENGINE))


@pytest.fixture(scope="module")
def publish(policies):
    """Publish the weights of a (0) or b (1), as a learner does."""
    writer = SharedMemoryWriter()
    yield lambda which: parity.live_weights(policies[which], writer)
    writer.close()


def assert_equal(found: dict[str, parity.Parity]) -> None:
    """Every token within the bound but those behind a routing flip, of which there are next to none in float32."""
    for case, one in found.items():
        assert float(one.differences.max()) <= BOUND, case
        assert len(one.after_flips) <= 0.1 * len(one.differences) and one.flips <= 0.01 * one.positions, case


def test_equal_fresh_and_after_syncs_there_and_back(engine, policies, requests, publish):
    assert_equal(parity.measure(engine, policies[0], requests))
    for version, which in ((1, 1), (2, 0)):  # the same images again: their features of the old weights must not be used
        engine.load_weights(publish(which), version)
        assert_equal(parity.measure(engine, policies[which], requests))


def test_the_bound_tells_models_apart(engine, policies, requests, folders):
    """The other model is far away, and the same model with only a small part changed is outside the bound."""
    found = parity.measure(engine, policies[1], {"text": requests["text"][:2]})["text"]
    assert float(torch.cat([found.differences, found.after_flips]).max()) > 0.1
    for part in ("vision_tower.patch_embed.pos_emb.weight", "multi_modal_projector.linear_2.bias", "e_score_correction_bias"):
        policy = load_policy(folders[0])
        with torch.no_grad():
            for name, tensor in policy.model.state_dict().items():
                if part in name:
                    tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        found = parity.measure(engine, policy, {"one image": requests["one image"][:2]})["one image"]
        assert float(torch.cat([found.differences, found.after_flips]).max()) > 50 * BOUND, part


def test_a_sampled_placeholder_is_a_token_like_any_other(engine, policies, requests, encoder):
    """Also in a response that is continued: neither side takes it for an image."""
    flat = [request for group in requests.values() for request in group]
    responses = [generation.token_ids for generation in engine.generate(flat)]
    cut = [ids.index(encoder.placeholder_id) + 1 if encoder.placeholder_id in ids[:-2] else None for ids in responses]
    continued = [
        replace(request, prefix_ids=ids[:at]) for request, ids, at in zip(flat, responses, cut, strict=True) if at and request.images
    ]
    assert continued
    whole = [replace(request, prompt_ids=request.prompt_ids + request.prefix_ids, prefix_ids=()) for request in continued]
    assert engine.generate(continued) == engine.generate(whole)
    assert_equal(parity.measure(engine, policies[0], {"continued": whole}))


def test_a_call_encodes_an_image_once_and_repeats_bit_for_bit(engine, requests):
    model = parity.vllm_model(engine)
    grids: list[list[list[int]]] = []
    hook = model.vision_tower.register_forward_pre_hook(lambda _, arguments: grids.append(arguments[1].tolist()))
    try:
        first = engine.generate(requests["two images"])
        assert [grid for call in grids for grid in call] == [list(image.grid) for image in requests["two images"][0].images]
        assert engine.generate(requests["two images"]) == first
        assert len(grids) == 2 * len({tuple(map(tuple, call)) for call in grids})
    finally:
        hook.remove()


def test_images_that_do_not_fit_are_refused(engine, requests, monkeypatch):
    request = requests["two images"][0]
    shifted = (request.image_positions[0] - 1, *request.image_positions[1:])
    for positions, message in ((request.image_positions[1:], "take .* tokens"), (shifted, "not neighbours")):
        with pytest.raises(ValueError, match=message):
            engine.generate([replace(request, image_positions=positions)])
    monkeypatch.setattr(engine.llm.renderer, "mm_processor", None)  # as with a text model
    with pytest.raises(RecipeError, match="request 1: has images, and the model is a text model"):
        engine.generate([requests["text"][0], request])


def test_incomplete_weights_are_refused_and_change_nothing(engine, requests, publish):
    before = engine.generate(requests["one image"][:2])
    handle = publish(1)
    tensors = tuple(spec for spec in handle.tensors if not spec.name.endswith("layers.1.mlp.gate.e_score_correction_bias"))
    with pytest.raises(ClusterError, match="`language_model.model.layers.1.mlp.gate.e_score_correction_bias` was not sent"):
        engine.load_weights(replace(handle, tensors=tensors), 3)
    assert engine.generate(requests["one image"][:2]) == before


def test_an_image_is_shared_by_identity_and_cached_by_content(engine, requests):
    """Equal patches in another object have the same hash, so a prefix that shows them is shared; others have another."""
    processor = engine.llm.renderer.mm_processor
    request = requests["one image"][0]
    (image,) = request.images
    copy = ImagePatches(pixels=image.pixels.copy(), grid=image.grid, num_tokens=image.num_tokens)
    other = ImagePatches(pixels=image.pixels + 1e-3, grid=image.grid, num_tokens=image.num_tokens)
    hashes = [
        processor.engine_input(request.prompt_ids, (one,), request.image_positions)["mm_hashes"]["image"] for one in (image, copy, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_equal_with_vllms_latent_attention(tmp_path, monkeypatch):
    """At the attention sizes of Kimi-VL-A3B, where vLLM keeps latents instead of keys and values. Last: an engine that goes takes the
    process's groups with it."""
    from vllm import envs

    monkeypatch.delenv("VLLM_MLA_DISABLE", raising=False)
    envs.disable_envs_cache()
    folder = parity.write_model(parity.MODELS["latent 576"], 0, tmp_path / "model")
    engine = VLLMEngine(str(folder), EngineConfig(**parity.ENGINE))
    assert engine.llm.model_config.use_mla
    requests = parity.make_requests(load_image_encoder(folder), samples=4, max_tokens=12)
    policy = load_policy(folder)
    assert_equal(parity.measure(engine, policy, requests))
    engine.load_weights(folder_handle(folder), 1)
    assert_equal(parity.measure(engine, policy, requests))
