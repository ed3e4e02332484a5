"""Preparing supervised data: conversations tokenised per second the first time and found done the second, and the memory that takes.

Writes a JSON Lines file of long-tailed conversations, several times larger than `--budget`, tokenises it into shards in a fresh process,
opens it again in another, and draws random examples there. Memory is that of the process beyond what its imports took: private pages,
since pages of mapped shards are the system's to drop. Exceeding the budget ends the benchmark with an error.

    python benchmarks/sft_data.py [--mib 64] [--budget 48]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ALPHABET = "0123456789+-*=?., abcdefghijklmnopqrstuvwxyz"


def write_data(path: Path, mib: int) -> int:
    """Rows of a prompt and an answer whose lengths are lognormal, median 800 characters; how many there are."""
    import numpy as np

    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list(ALPHABET), 100_000))
    rows = 0
    with path.open("w") as file:
        while file.tell() < mib << 20:
            length = int(min(rng.lognormal(6.7, 1.0), 30_000))
            start = int(rng.integers(0, len(text) - length))
            question = text[start : start + length // 4].strip() or "?"
            answer = text[start + length // 4 : start + length].strip() or "0"
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
            rows += 1
    return rows


def private_mib() -> float:
    """Private memory of this process (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """The largest `private_mib` within a block, looked at every 20 ms, less what it was at the beginning."""

    def __enter__(self) -> Peak:
        self.before = self.most = private_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, private_mib())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown(self) -> float:
        return self.most - self.before


def prepare(path: str) -> None:
    """Run in a fresh process: tokenise or find done; then draw."""
    from pydantic import TypeAdapter

    from bregman.data.config import SourceConfig
    from bregman.models.tiny.tokenizer import character_tokenizer
    from recipes.examples import tokenised

    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.apply_chat_template([{"role": "user", "content": "1"}])  # what is imported late is imported now
    import numpy as np

    source = TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": path})
    with Peak() as peak:
        started = time.perf_counter()
        store = tokenised(source, Path(path).parent, tokenizer, 0, "error")
        seconds = time.perf_counter() - started
        picks = np.random.default_rng(0).integers(0, len(store), 2000).tolist()
        started = time.perf_counter()
        drawn = sum(len(store[index].token_ids) for index in picks)
        drawing = time.perf_counter() - started
    tokens = int(store.lengths.sum())
    print(
        json.dumps({"seconds": seconds, "rows": len(store), "tokens": tokens, "mib": peak.grown, "draws": len(picks) / drawing, "n": drawn})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the data")
    parser.add_argument("--budget", type=float, default=48, help="MiB of memory that preparing it may take")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare(arguments.prepare)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        rows = write_data(data, arguments.mib)
        print(f"{rows:,} conversations, {arguments.mib} MiB; budget {arguments.budget:.0f} MiB")
        environment = {**os.environ, "BREGMAN_CACHE": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        for name in ("first start", "second start"):
            command = [sys.executable, __file__, "--prepare", str(data)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"  {name:<13} {found['seconds']:7.1f} s  {found['rows'] / found['seconds']:>10,.0f} rows/s  "
                f"{found['tokens'] / found['seconds']:>13,.0f} tokens/s  {found['mib']:6.1f} MiB  {found['draws']:,.0f} draws/s"
            )
            if found["mib"] > arguments.budget:
                raise SystemExit(f"{found['mib']:.0f} MiB are more than the budget of {arguments.budget:.0f} MiB")


if __name__ == "__main__":
    main()
