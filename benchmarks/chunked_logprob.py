"""Log-probabilities of one pack, forward and backward, with full logits and block by block: seconds and peak memory.

Every measurement has a process of its own, which reports the growth of its peak resident memory over the inputs (hidden states and
head), gradients included, and the median time of its repeats. The naive way is cross entropy of the head's output in float32, as
`token_logprobs` computes it for short packs. At 8,192 tokens it needs 17 GB.

    python benchmarks/chunked_logprob.py [--tokens 8192] [--width 512] [--dtype float32 bfloat16] [--repeats 3] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY = 163_840
"""Of Kimi-VL."""
GOAL_MEMORY, GOAL_TIME = 1 / 8, 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=["naive", "blocks"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_measure(options.way, options.tokens, options.width, options.dtype[0], options.repeats, options.device)))
        return
    print(f"{options.tokens} tokens, width {options.width}, vocabulary {VOCABULARY}, forward and backward, on {options.device}\n")
    print("| dtype | naive s | ours s | time (goal 1.10) | naive GiB | ours GiB | memory (goal 1/8) |\n|---|---|---|---|---|---|---|")
    for dtype in options.dtype:
        naive, ours = (_in_its_own_process(way, dtype, options) for way in ("naive", "blocks"))
        if abs(naive["total"] - ours["total"]) > 1e-3 * abs(naive["total"]):
            raise RuntimeError(f"log-probabilities add up to {naive['total']} and {ours['total']}")
        print(
            f"| {dtype} | {naive['seconds']:.2f} | {ours['seconds']:.2f} | {ours['seconds'] / naive['seconds']:.2f} "
            f"| {naive['gib']:.2f} | {ours['gib']:.2f} | 1/{naive['gib'] / ours['gib']:.1f} |",
            flush=True,
        )


def _in_its_own_process(way: str, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    settings = {"--tokens": options.tokens, "--width": options.width, "--repeats": options.repeats, "--device": options.device}
    arguments = [str(part) for pair in settings.items() for part in pair]
    command = [sys.executable, str(Path(__file__)), "--way", way, "--dtype", dtype, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(way: str, tokens: int, width: int, dtype_name: str, repeats: int, device: str) -> dict[str, float]:
    import torch

    from bregman.models import logprobs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    head = torch.nn.Linear(width, VOCABULARY, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (tokens,), device=device)
    upstream = torch.randn(tokens, device=device)  # all tokens are trained, with weights of their own, as in OPMD
    if way == "naive":
        logprobs.MAX_LOGITS = tokens * VOCABULARY
    before, seconds, total = _peak_bytes(device), [], 0.0
    for _ in range(repeats):
        hidden.grad = head.weight.grad = None
        started = time.perf_counter()
        values = logprobs.next_token_logprobs(hidden, head, targets)
        values.backward(upstream)
        total = float(values.detach().sum())  # waits for the device
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        del values
    return {"seconds": statistics.median(seconds), "gib": (_peak_bytes(device) - before) / 2**30, "total": total}


def _peak_bytes(device: str) -> int:
    import torch

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if device == "cpu" else torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
