"""Kimi-VL inside vLLM: its model class with Bregman's image processing, the same that the learner uses, in place of remote code.

Owns the way from images, or from patches that exist already, to what vLLM's model takes. vLLM imports this module when it serves a
Kimi-VL (see `vllm_plugin.register`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.utils import cached_file
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.model_executor.models import kimi_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs, PromptReplacement, PromptUpdate

from bregman.models.kimi_vl.image_processing import SETTINGS_FILE
from bregman.models.vision import load_image_encoder
from bregman.protocols import ImageEncoder
from bregman.types import ImagePatches

EncodedImage = tuple[MultiModalKwargsItem, str]
"""What vLLM's model takes for one image, and the hash under which its features are cached."""


class KimiVLProcessingInfo(upstream.KimiVLProcessingInfo):
    """Adds the folder's image encoder."""

    @cached_property
    def encoder(self) -> ImageEncoder:
        config = self.ctx.model_config
        file = cached_file(config.model, SETTINGS_FILE, revision=config.revision)
        encoder = load_image_encoder(Path(str(file)).parent)
        assert encoder is not None  # the folder's architecture brought us here
        return encoder


class KimiVLMultiModalProcessor(upstream.KimiVLMultiModalProcessor):
    """Images and prompts to model inputs."""

    requires_tokenizer = False
    info: KimiVLProcessingInfo

    def engine_input(
        self,
        prompt_ids: Sequence[int],
        images: Sequence[ImagePatches],
        image_positions: Sequence[int],
        known: MutableMapping[int, EncodedImage] | None = None,
    ) -> MultiModalInput:
        """A prompt whose images are patches already, as `LLMEngine.add_request` takes it.

        vLLM places features at exactly `image_positions`; a placeholder id elsewhere, say in a sampled response, is a token like
        any other.

        Args:
            prompt_ids: token ids with one placeholder per image token.
            images: in the order in which the prompt shows them.
            image_positions: places of the image tokens, ascending; those of one image are neighbours.
            known: images seen before by `id`; keep them alive as long as this.

        Raises:
            ValueError: the positions do not fit the images.
        """
        ranges = placeholder_ranges(images, image_positions, len(prompt_ids))
        known = {} if known is None else known
        for patches in images:
            if id(patches) not in known:
                known[id(patches)] = (self._item(patches), _hash(patches))
        items, hashes = zip(*(known[id(patches)] for patches in images), strict=True)
        return mm_input(list(prompt_ids), MultiModalKwargsItems({"image": list(items)}), {"image": list(hashes)}, {"image": ranges})

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions) -> ProcessorInputs:
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        prompt = [self.info.image_token_id] * mm_counts.get("image", 0)
        return ProcessorInputs(prompt=prompt, mm_data_items=self.info.parse_mm_data(data, validate=False))

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""  # upstream's would ask a tokenizer for the placeholder

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in hf_data["images"]]
        return self._features([self.info.encoder.encode(image.convert("RGB")) for image in images])

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Sequence[PromptUpdate]:
        token = self.info.image_token_id
        rows, columns = self.info.get_hf_config().vision_config.merge_kernel_size

        def placeholders(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_hws"].data
            return [token] * (int(grid.prod()) // (rows * columns))

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

    def _item(self, patches: ImagePatches) -> MultiModalKwargsItem:
        features = self._features([patches])
        return MultiModalKwargsItems.from_hf_inputs(features, self._get_mm_fields_config(features, {}))["image"][0]

    def _features(self, images: Sequence[ImagePatches]) -> BatchFeature:
        pixels = torch.cat([torch.from_numpy(patches.pixels) for patches in images])
        grids = torch.tensor([patches.grid for patches in images], dtype=torch.int64)
        return BatchFeature({"pixel_values": pixels.to(self.info.ctx.model_config.dtype), "image_grid_hws": grids})


@MULTIMODAL_REGISTRY.register_processor(
    KimiVLMultiModalProcessor, info=KimiVLProcessingInfo, dummy_inputs=upstream.KimiVLDummyInputsBuilder
)
class KimiVLForConditionalGeneration(upstream.KimiVLForConditionalGeneration):
    """vLLM's own model."""


def placeholder_ranges(images: Sequence[ImagePatches], image_positions: Sequence[int], prompt_length: int) -> list[PlaceholderRange]:
    """Where each image stands in the prompt.

    Raises:
        ValueError: the positions do not fit the images.
    """
    needed = sum(patches.num_tokens for patches in images)
    if needed != len(image_positions):
        raise ValueError(f"the images take {needed} tokens, the prompt has {len(image_positions)} places for them")
    ranges, place = [], 0
    for patches in images:
        mine = image_positions[place : place + patches.num_tokens]
        start = int(mine[0])
        if [int(position) for position in mine] != list(range(start, start + len(mine))) or start + len(mine) > prompt_length:
            raise ValueError(f"the places of an image of {len(mine)} tokens are not neighbours within the prompt")
        ranges.append(PlaceholderRange(offset=start, length=len(mine)))
        place += len(mine)
    return ranges


def _hash(patches: ImagePatches) -> str:
    digest = hashlib.blake2b(repr(patches.grid).encode(), digest_size=16)
    digest.update(patches.pixels.tobytes())
    return digest.hexdigest()
