"""One vLLM engine in this process: requests in, sampled tokens with log-probabilities out, new weights between calls.

Owns vLLM's settings and the step loop; knows nothing of Ray, problems or policies (see `rollout_workers`). vLLM itself is
imported when an engine is made, since its environment variables must be set before.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bregman.engines import vllm_plugin
from bregman.engines.config import EngineConfig
from bregman.engines.weight_sync import WeightHandle, check_current, folder_handle
from bregman.errors import ClusterError, RecipeError
from bregman.types import FinishReason, ImagePatches

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams

VLLM_ENV: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # step the engine ourselves: fixed order, and 12-13k tokens/s where AsyncLLM makes 10-13k
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
EAGER_ENV: Mapping[str, str] = {"TORCHDYNAMO_DISABLE": "1"}  # without it even eager mode compiles the samplers on a CPU
CPU_LATENT_SIZE = 576  # kv_lora_rank + qk_rope_head_dim of vLLM's CPU kernel

# A loop is the same 4 to 64 tokens six times over; shorter patterns loop at a multiple of their length.
REPETITION = {"min_pattern_size": 4, "max_pattern_size": 64, "min_count": 6}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What to sample.

    Attributes:
        prompt_ids: prompt token ids.
        max_tokens: most tokens to sample now.
        temperature: 0 is greedy.
        top_p: nucleus; below 1 the log-probabilities are those of the renormalised distribution.
        seed: of this response's own random stream.
        stop_token_ids: tokens that end a response; the sampled one is part of it.
        prefix_ids: the response so far, to be continued; not part of the result.
        stop_on_repetition: end looping responses early.
        images: as the learner takes them, in the order in which the prompt shows them; requests that share an image share the object.
        image_positions: places in `prompt_ids` of the tokens that stand for image features, ascending.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    stop_on_repetition: bool = False
    images: tuple[ImagePatches, ...] = ()
    image_positions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What was sampled.

    Attributes:
        token_ids: the new tokens, the end token included, length n.
        logprobs: nats, length n, at the sampling temperature (at temperature 1 for greedy).
        finish_reason: why it ended.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


def set_environment(model: Path, config: EngineConfig) -> None:
    """Set what vLLM reads from the environment, where the user has not."""
    for name, value in {**VLLM_ENV, **(EAGER_ENV if config.enforce_eager else {}), **latent_attention(model)}.items():
        os.environ.setdefault(name, value)


def latent_attention(model: Path) -> dict[str, str]:
    """vLLM's multi-head latent attention on a CPU knows one size, DeepSeek's; models of other sizes use plain attention there."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # vLLM says what is wrong with the folder
    text = config.get("text_config") or config
    rank = text.get("kv_lora_rank")
    if not rank or torch.cuda.is_available() or rank + text.get("qk_rope_head_dim", 0) == CPU_LATENT_SIZE:
        return {}
    return {"VLLM_MLA_DISABLE": "1"}


class VLLMEngine:
    """A vLLM engine stepped by the caller.

    Args:
        model: a Hugging Face folder.
        config: engine settings.
        seed: of everything that has no seed of its own.
        tensor_parallel: GPUs of this engine.

    Raises:
        ClusterError: vLLM cannot start with these settings.
    """

    def __init__(self, model: str, config: EngineConfig, seed: int = 0, *, tensor_parallel: int = 1) -> None:
        self.config = config
        self.expected = _shapes(folder_handle(Path(model)))
        self.broken = ""
        set_environment(Path(model), config)
        started = time.perf_counter()
        try:
            self.llm: LLMEngine = _start(model, config, seed, tensor_parallel)
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            traceback.print_exc()
            raise ClusterError("engine", f"vLLM cannot start on {model} ({_first_line(error)})", "see the worker's log") from error
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        self.start_seconds = time.perf_counter() - started

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Sample all requests; results in the order of `requests`.

        All requests are admitted in order before the first step and the caches start empty, so equal calls on equal weights return
        equal tokens and log-probabilities bit for bit. An image is encoded once per call, however many requests show it.

        Raises:
            RecipeError: a request does not fit `max_model_len`, or has images that the model cannot take.
            ClusterError: an earlier weight update failed half-way.
        """
        if self.broken:
            raise ClusterError("engine", f"its weights are incomplete since an update failed ({self.broken})", "restart the worker")
        for index, request in enumerate(requests):
            check_fits(request, self.config.max_model_len, f"request {index}")
        prompts = self._prompts(requests)
        self.llm.reset_prefix_cache()
        self.llm.reset_encoder_cache()
        generations: list[Generation | None] = [None] * len(requests)
        try:
            for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                self.llm.add_request(str(index), prompt, _sampling_params(request))
            while self.llm.has_unfinished_requests():
                outputs: list[Any] = self.llm.step()
                for output in outputs:
                    if output.finished:
                        generations[int(output.request_id)] = _generation(output.outputs[0])
        finally:
            unfinished = [str(index) for index, generation in enumerate(generations) if generation is None]
            if unfinished:  # an interrupted call must not leak into the next one
                self.llm.abort_request(unfinished)
        return [generation for generation in generations if generation is not None]

    def _prompts(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        from vllm.inputs.engine import tokens_input

        processor: Any = self.llm.renderer.mm_processor
        prompts: list[Any] = []
        seen: dict[int, Any] = {}
        for index, request in enumerate(requests):
            ids = [*request.prompt_ids, *request.prefix_ids]
            if not request.images:
                prompts.append(tokens_input(ids))
            elif processor is None:
                raise RecipeError(f"request {index}", "has images, and the model is a text model", "use a vision model")
            else:
                prompts.append(processor.engine_input(ids, request.images, request.image_positions, seen))
        return prompts

    def load_weights(self, handle: WeightHandle, version: int) -> dict[str, float]:
        """Take over the weights of `handle` as policy `version`; loading the same handle again changes nothing.

        Returns:
            Seconds: `load` (read, load and check) and `caches` (prefix, multimodal and encoder caches reset).

        Raises:
            ClusterError: the handle is stale, lacks tensors of this model, or the weights did not arrive as sent.
        """
        started = time.perf_counter()
        self._check(handle)
        self.broken = "in progress"
        try:
            self.llm.collective_rpc("start_weight_update")
            self.llm.collective_rpc("update_weights", kwargs={"update_info": {"handle": handle.to_dict()}})
            self.llm.collective_rpc("finish_weight_update")
        except Exception as error:
            self.broken = _first_line(error)
            raise
        loaded = time.perf_counter()
        # Keys and values, and image features, of the old weights.
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.reset_encoder_cache()
        self.llm.engine_core.set_weight_version(str(version))
        self.broken = ""
        return {"load": loaded - started, "caches": time.perf_counter() - loaded}

    def _check(self, handle: WeightHandle) -> None:
        """Refuse, with the old weights still in place, what could only be loaded in part."""
        check_current(handle)
        sent = _shapes(handle)
        tied = bool(getattr(self.llm.model_config.hf_text_config, "tie_word_embeddings", False))
        optional = ("rotary_emb.inv_freq", "lm_head.weight") if tied else ("rotary_emb.inv_freq",)
        for name, shape in self.expected.items():
            if name not in sent:
                if name.endswith(optional):
                    continue
                raise ClusterError("weight sync", f"`{name}` was not sent", "send every tensor of the model, by its checkpoint name")
            if sent[name] != shape:
                raise ClusterError("weight sync", f"`{name}` has shape {sent[name]} where the engine's model has {shape}")
        extra = [name for name in sent if name not in self.expected and not name.endswith(optional)]
        if extra:
            raise ClusterError("weight sync", f"the engine's model has no `{extra[0]}`", "send tensors by their checkpoint names")


def check_fits(request: GenerationRequest, max_model_len: int, what: str) -> None:
    """Raise RecipeError unless prompt, response so far and new tokens fit the engine's window together."""
    used = len(request.prompt_ids) + len(request.prefix_ids)
    if used + request.max_tokens > max_model_len:
        found = f"prompt ({used} tokens) plus max_tokens ({request.max_tokens}) exceeds engine.max_model_len ({max_model_len})"
        fix = f"set max_tokens <= {max_model_len - used}" if used < max_model_len else "raise max_model_len or drop this prompt"
        raise RecipeError(what, found, fix)


def _start(model: str, config: EngineConfig, seed: int, tensor_parallel: int) -> LLMEngine:
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    vllm_plugin.register()  # also where Bregman is on the path but not installed, so that vLLM finds no entry point
    if current_platform.is_cpu() and not vllm_plugin.has_known_bugs():
        logging.getLogger(__name__).warning("workarounds of vLLM's CPU bugs are for vLLM %d.%d only", *vllm_plugin.WRITTEN_FOR)

    # A partial prefill rewinds the request's random generator, which on a CPU is an error ("CPU Generator does not use offset", vLLM 0.32):
    # prompts are prefilled whole there.
    chunked_prefill = not current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len),
        "enable_chunked_prefill": chunked_prefill,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "seed": seed,
        "tensor_parallel_size": tensor_parallel,
        "skip_tokenizer_init": True,
        "mm_processor_cache_gb": 0,  # requests bring patches, not images
        "generation_config": "vllm",  # nothing from the folder's generation_config.json: requests say everything
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend="bregman_shared_memory"),
        "worker_extension_cls": "bregman.engines.vllm_transfer.WorkerExtension",
    }
    if config.kv_cache_mib is not None:
        arguments["kv_cache_memory_bytes"] = config.kv_cache_mib * 2**20
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _sampling_params(request: GenerationRequest) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # the model folder's idea of an end token; only `stop_token_ids` counts
        repetition_detection=RepetitionDetectionParams(**REPETITION) if request.stop_on_repetition else None,
        detokenize=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _generation(completion: Any) -> Generation:
    token_ids = tuple(completion.token_ids)
    logprobs = tuple(completion.logprobs.logprobs)
    if tuple(completion.logprobs.token_ids) != token_ids:
        raise RuntimeError("vLLM returned log-probabilities of other tokens than the sampled ones")
    return Generation(token_ids=token_ids, logprobs=logprobs, finish_reason=completion.finish_reason)


def _shapes(handle: WeightHandle) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in handle.tensors}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
