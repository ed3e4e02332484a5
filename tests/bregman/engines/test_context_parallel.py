"""Two ranks that share every micro-batch give what one rank gives: log-probabilities, loss, gradients, weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from context_cases import CASES, make_models, sequences_of

HERE = Path(__file__).parent


def start(folder: Path, rank: int, ranks: int, context: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "context_cases.py"), str(folder), *map(str, (rank, ranks, context))]
    folders = (HERE, HERE.parents[1], HERE.parents[2])
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By process: one rank alone, then the two that share."""
    folder = tmp_path_factory.mktemp("context")
    make_models(folder)
    layout = [(0, 1, 1), (0, 2, 2), (1, 2, 2)]
    processes = [start(folder, *arguments) for arguments in layout]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"result-{ranks}-{context}-{rank}.pt") for rank, ranks, context in layout]


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_two_ranks_that_share_equal_one(results: list[list[dict[str, Any]]], index: int) -> None:
    alone, first, second = (answers[index] for answers in results)
    assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"]
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    for name, value in alone["metrics"].items():  # the load of experts counts the few tokens of filler
        assert first["metrics"][name] == pytest.approx(value, rel=0.1 if name.startswith("moe/") else 1e-5)
    assert first["tokens"] == alone["tokens"] == sum(len(each.token_ids) for each in sequences_of(CASES[index][2]))
    for shared in (first, second):
        for ours, expected in zip(shared["logprobs"], alone["logprobs"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert first["gradients"].keys() == alone["gradients"].keys() != set()
    scale = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for kind, tolerance in (("gradients", 2e-6 * scale), ("weights", 1e-5)):
        for name, expected in alone[kind].items():
            assert (first[kind][name] - expected).abs().max() < tolerance, (kind, name)
