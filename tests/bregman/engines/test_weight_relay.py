"""Weights to another node: two Ray nodes on one machine, a relay on the second, and readers that have the copy only."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bregman.engines import cluster, weight_relay
from bregman.engines.config import ClusterConfig, EngineConfig
from bregman.engines.rollout_workers import RolloutWorkers
from bregman.engines.weight_relay import WeightRelays
from bregman.engines.weight_sync import SharedMemoryWriter, WeightHandle, read_tensors
from bregman.errors import ClusterError


@pytest.fixture(scope="module")
def nodes():
    """Ray's ids of two nodes; this process is on the first."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    second = made.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.start(ClusterConfig(address=made.address))
    here = ray.get_runtime_context().get_node_id()
    yield here, second.node_id
    cluster.stop()
    made.shutdown()


@pytest.fixture
def writer():
    writer = SharedMemoryWriter()
    yield writer
    writer.close()


@pytest.fixture
def notes():
    return []


@pytest.fixture
def relays(notes, monkeypatch):
    monkeypatch.setattr(weight_relay, "CHUNK_BYTES", 10_000)  # the weights below are many chunks
    relays = WeightRelays(timeout=60, on_note=notes.append)
    yield relays
    relays.close()


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"a": torch.randn(70, 500), "half": torch.randn(1291).to(torch.bfloat16), "empty": torch.empty(0, 4), "last": torch.randn(7)}


def read_on(node: str, handle: WeightHandle) -> dict[str, torch.Tensor]:
    """What a worker on `node` reads."""

    def read() -> tuple[str, dict[str, torch.Tensor]]:
        return ray.get_runtime_context().get_node_id(), {name: tensor.clone() for name, tensor in read_tensors(handle)}

    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    where, tensors = ray.get(ray.remote(read).options(num_cpus=0, scheduling_strategy=pinned).remote(), timeout=60)
    assert where == node
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def publish(writer: SharedMemoryWriter, node: str, seed: int) -> WeightHandle:
    from dataclasses import replace

    return replace(writer.write(weights(seed).items()), node=node)


def test_the_other_node_reads_a_copy_of_its_own(nodes, writer, relays):
    here, there = nodes
    for seed in (0, 1):  # the second delivery reuses the relay and its segment
        handle = publish(writer, here, seed)
        copy = relays.deliver(handle, [there])[there]
        assert copy.node == there != handle.node and copy.path != handle.path and copy.checksum == handle.checksum
        assert relays.deliver(handle, [there])[there] == copy, "delivered twice"
        if seed:
            writer.close()  # nothing but the copy is left
        assert_equal(read_on(there, copy), weights(seed))
    relays.close()
    assert not Path(copy.path).exists()


def test_a_relay_that_dies_is_replaced(nodes, writer, relays, notes):
    here, there = nodes
    relays.deliver(publish(writer, here, 0), [there])
    process = ray.get(relays._relays[there].__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    os.kill(process, signal.SIGKILL)
    handle = publish(writer, here, 1)
    assert_equal(read_on(there, relays.deliver(handle, [there])[there]), weights(1))
    assert len(notes) == 1 and "replacing it (1 of 2)" in notes[0] and there[:8] in notes[0]


def test_a_segment_that_is_overwritten_or_gone_is_not_delivered(nodes, writer, relays):
    here, there = nodes
    stale = publish(writer, here, 0)
    publish(writer, here, 1)
    with pytest.raises(ClusterError, match="holds write 2, not write 1"):
        relays.deliver(stale, [there])


def test_a_node_without_room_is_named(nodes, writer, relays):
    from dataclasses import replace

    here, there = nodes
    handle = replace(publish(writer, here, 0), num_bytes=9 * 10**15)
    with pytest.raises(ClusterError, match="9,000,000,000,000,000 bytes of weights do not fit") as caught:
        relays.deliver(handle, [there])
    assert there[:8] in caught.value.where


@pytest.mark.parametrize(("how", "direct"), [("auto", True), ("shared_memory", True), ("relay", False)])
def test_which_workers_need_a_relay(nodes, writer, how, direct):
    here, there = nodes
    made: Any = RolloutWorkers(
        Path("unused"),
        EngineConfig(max_model_len=8, weight_sync=how),
        ClusterConfig(),
        tokenizer=None,
        stop_token_ids=(),  # type: ignore[arg-type]
    )
    try:
        made._handle = publish(writer, here, 0)
        assert (made._local_handles([here, here])[here] == made._handle) == direct
        if how == "shared_memory":
            with pytest.raises(ClusterError, match="reaches .* only, and a rollout worker is on"):
                made._local_handles([here, there])
        else:
            assert made._local_handles([here, there])[there].node == there
    finally:
        made.close()
