"""Tokens per second of a rollout worker over bare vLLM, on the same engine with the same requests, in alternating pairs.

The worker's time covers everything from problems to decoded trajectories in the driver; bare vLLM's only its own step loop.

    python benchmarks/rollout_worker.py [--pairs 7] [--problems 64] [--samples 8] [--max-tokens 128]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bregman.engines import cluster, rollout_workers
from bregman.engines.config import ClusterConfig, EngineConfig, SamplingConfig
from bregman.engines.rollout_workers import RolloutWorker, RolloutWorkers
from bregman.engines.vllm_engine import GenerationRequest
from bregman.types import Problem

END = 3


class BareWorker(RolloutWorker):
    """A rollout worker that can also run the same requests through vLLM alone, as `LLM.generate` does."""

    def bare(self, requests: list[GenerationRequest]) -> tuple[int, float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm: Any = self.engine.llm
        llm.reset_prefix_cache()
        started = time.perf_counter()
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop_token_ids=list(request.stop_token_ids),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            llm.add_request(str(index), {"prompt_token_ids": list(request.prompt_ids)}, params)
        outputs: list[Any] = []
        while llm.has_unfinished_requests():
            outputs += [output for output in llm.step() if output.finished]
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def small_model() -> Qwen3ForCausalLM:
    """About 0.4M parameters, the size of the demo's model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()

    vocabulary = {"<|im_end|>": END, **{f"w{i}": i for i in range(64) if i != END}}
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), chat_template=template)
    prompts = [tuple(4 + (7 * i + j) % 60 for j in range(12 + i % 9)) for i in range(options.problems)]
    problems = [Problem(id=f"p{i}", messages=(), prompt_ids=prompt) for i, prompt in enumerate(prompts)]
    sampling = SamplingConfig(num_samples=options.samples, max_tokens=options.max_tokens)
    rollout_workers.RolloutWorker = BareWorker  # type: ignore[misc]
    config = ClusterConfig()
    cluster.start(config)
    with tempfile.TemporaryDirectory() as folder:
        small_model().save_pretrained(folder)
        workers = RolloutWorkers.start(Path(folder), EngineConfig(max_model_len=256), config, tokenizer=tokenizer, stop_token_ids=(END,))
        workers.ready()
    try:
        worker_rates, bare_rates, ratios, outside = [], [], [], []
        for pair in range(options.pairs + 1):  # the first pair warms up
            requests = [request for group in workers._requests(problems, sampling, pair) for request in group]
            rates: dict[str, float] = {}
            for kind in ("worker", "bare") if pair % 2 else ("bare", "worker"):
                if kind == "worker":
                    workers.rollout(problems, sampling, seed=pair)
                    rates[kind], tokens = workers.last_stats["tokens_per_second"], int(workers.last_stats["tokens"])
                else:
                    bare_tokens, seconds = ray.get(workers._workers[0].bare.remote(requests))
                    rates[kind] = bare_tokens / seconds
            if tokens != bare_tokens:
                raise RuntimeError(f"the worker sampled {tokens} tokens, bare vLLM {bare_tokens}")
            if pair:
                worker_rates.append(rates["worker"])
                bare_rates.append(rates["bare"])
                ratios.append(rates["worker"] / rates["bare"])
                outside.append(1 - workers.last_stats["worker_seconds"] / workers.last_stats["seconds"])
        print(f"rollout worker: {statistics.median(worker_rates):.0f} tokens/s (median of {options.pairs})")
        print(f"bare vLLM: {statistics.median(bare_rates):.0f} tokens/s (median of {options.pairs})")
        print(f"rollout worker over bare vLLM: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}; goal 0.97)")
        print(f"share of a rollout spent outside the engine (transport, decoding): {100 * statistics.median(outside):.1f} %")
    finally:
        workers.close()
        cluster.stop()


if __name__ == "__main__":
    main()
