"""Weights to rollout workers on other nodes: one relay per node copies the learner's segment into shared memory there.

Owns the way from node to node (Ray's object store, in chunks). What a segment is and how it is read is in `weight_sync`: an engine
reads the copy exactly as it would read the original.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bregman.engines import cluster
from bregman.engines.weight_sync import HEADER_BYTES, SharedMemoryWriter, WeightHandle, check_current, read_bytes
from bregman.errors import ClusterError

CHUNK_BYTES = 64 * 2**20
IN_FLIGHT = 3
"""Chunks under way at once: one being read, one travelling, one being written. Together they fit the object store of a local Ray."""
MAX_REPLACEMENTS = 2  # of one relay within one delivery
GRACE_SECONDS = 5.0


class WeightRelay:
    """The Ray actor: reads the segment on the learner's node, or writes a copy of it on another."""

    def __init__(self) -> None:
        self._writer: SharedMemoryWriter | None = None
        self._source: tuple[str, str, int] | None = None
        self._held: WeightHandle | None = None

    def read(self, handle: WeightHandle, position: int, count: int) -> Any:
        """Bytes of a segment of this node: uint8 [count], numpy. Ray copies them into its object store."""
        return read_bytes(handle, position, count)

    def begin(self, handle: WeightHandle) -> WeightHandle | None:
        """Prepare for the chunks of `handle`; the handle of the copy if this relay holds it already.

        Raises:
            ClusterError: no room for it on this node.
        """
        source = (handle.node, handle.path, handle.sequence)
        if self._held is not None and source == self._source:
            return self._held
        self._held, self._source, self._next = None, source, HEADER_BYTES
        self._writer = self._writer or SharedMemoryWriter()
        try:
            self._writer.begin(handle.num_bytes)
        except ClusterError as error:  # host names may repeat; Ray's ids do not
            raise ClusterError(f"{error.where} (node {ray.get_runtime_context().get_node_id()[:8]})", error.found, error.fix) from error
        return None

    def take(self, position: int, data: Any) -> None:
        """Write one chunk; they come in order."""
        assert self._writer is not None
        if position != self._next:
            raise RuntimeError(f"chunk at {position} where {self._next} was expected")
        self._writer.put(memoryview(data), position)
        self._next = position + len(data)

    def finish(self, handle: WeightHandle) -> WeightHandle:
        """Declare the copy whole; its handle, good for this node, until the next `begin`."""
        assert self._writer is not None
        if self._next != HEADER_BYTES + handle.num_bytes:
            raise RuntimeError(f"{self._next - HEADER_BYTES} bytes arrived, {handle.num_bytes} were sent")
        sequence = self._writer.commit(handle.num_bytes)
        host, node = os.uname().nodename, ray.get_runtime_context().get_node_id()
        self._held = replace(handle, path=self._writer.path, sequence=sequence, host=host, node=node)
        return self._held

    def check(self, handle: WeightHandle) -> None:
        """Raise ClusterError unless the segment still holds what `handle` describes."""
        check_current(handle)

    def close(self) -> None:
        """Remove the copy."""
        if self._writer is not None:
            self._writer.close()


class WeightRelays:
    """The relays of a run: started where and when they are needed, replaced when they die.

    Args:
        timeout: seconds for one delivery to all nodes.
        on_note: called with a line about each relay that was replaced.
    """

    def __init__(self, *, timeout: float, on_note: Callable[[str], None]) -> None:
        self._timeout, self._on_note = timeout, on_note
        self._relays: dict[str, Any] = {}
        self._sender: tuple[str, Any] | None = None

    def deliver(self, handle: WeightHandle, nodes: Iterable[str]) -> dict[str, WeightHandle]:
        """Copy the segment of `handle` to each of `nodes`; a node that holds it already gets nothing.

        Each chunk is read once, put once, and pulled once per node; at most IN_FLIGHT chunks are on their way.

        Args:
            handle: with `node` set.
            nodes: Ray's ids.

        Returns:
            By node, the handle for its workers; good until the next delivery.

        Raises:
            ClusterError: no room on a node, the deadline passed, a relay kept dying, or the segment changed meanwhile.
        """
        deadline = time.monotonic() + self._timeout
        pending = sorted(set(nodes))
        held: dict[str, WeightHandle] = {}
        replaced: Counter[str] = Counter()
        while pending:
            arrived, died = self._send(handle, pending, deadline)
            held |= arrived
            for node, error in died.items():
                if replaced[node] == MAX_REPLACEMENTS:
                    raise error
                replaced[node] += 1
                self._on_note(f"{error.where}: {error.found}; replacing it ({replaced[node]} of {MAX_REPLACEMENTS}) and sending again")
                ray.kill(self._relays.pop(node))
                if self._sender is not None:  # may be what died: a chunk that could not be read fails where it was due
                    ray.kill(self._sender[1])
                    self._sender = None
            pending = list(died)
        return held

    def close(self) -> None:
        """End the relays and remove their copies."""
        actors = list(self._relays.values())
        closed = [actor.close.remote() for actor in actors]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=GRACE_SECONDS)
        for actor in [*actors, *([self._sender[1]] if self._sender else [])]:
            ray.kill(actor)
        self._relays, self._sender = {}, None

    def _send(self, handle: WeightHandle, nodes: Sequence[str], deadline: float) -> tuple[dict[str, WeightHandle], dict[str, ClusterError]]:
        """One attempt; the nodes that have it now, and those whose relay died on the way."""
        died: dict[str, ClusterError] = {}
        names = {node: node_name(node) for node in nodes}

        def results(refs: dict[str, Any], what: str) -> dict[str, Any]:
            values = {}
            for node, ref in refs.items():
                try:
                    values[node] = _wait(ref, f"weight relay on {names[node]}: {what}", deadline)
                except ClusterError as error:
                    if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                        raise
                    died[node] = error
            return values

        def alive() -> list[str]:
            return [node for node in receivers if node not in died]

        for node in nodes:
            if node not in self._relays:
                self._relays[node] = _start(node)
        held = results({node: self._relays[node].begin.remote(handle) for node in nodes}, "begin")
        receivers = [node for node, copy in held.items() if copy is None]
        if not receivers:
            return held, died
        sender = self._sender_on(handle.node)
        under_way: deque[dict[str, Any]] = deque()
        end = HEADER_BYTES + handle.num_bytes
        for position in range(HEADER_BYTES, end, CHUNK_BYTES):
            if len(under_way) == IN_FLIGHT:
                results(under_way.popleft(), "take a chunk")
            if not alive():
                break
            chunk = sender.read.remote(handle, position, min(CHUNK_BYTES, end - position))
            under_way.append({node: self._relays[node].take.remote(position, chunk) for node in alive()})
            del chunk  # the object store may free it as soon as it is written
        while under_way:
            results(under_way.popleft(), "take a chunk")
        if alive():
            _wait(sender.check.remote(handle), f"sender of weights on {node_name(handle.node)}", deadline)
        finished = results({node: self._relays[node].finish.remote(handle) for node in alive()}, "finish")
        return {node: copy for node, copy in (held | finished).items() if copy is not None and node not in died}, died

    def _sender_on(self, node: str) -> Any:
        if self._sender is not None and self._sender[0] != node:
            ray.kill(self._sender[1])
            self._sender = None
        self._sender = self._sender or (node, _start(node))
        return self._sender[1]


def node_name(node: str) -> str:
    """How to call a node in messages: its host name and the start of Ray's id, which tells nodes of one machine apart."""
    known = {each["NodeID"]: each["NodeManagerHostname"] for each in ray.nodes()}
    return f"{known.get(node, 'a lost node')} ({node[:8]})"


def _start(node: str) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    relay: Any = ray.remote(WeightRelay).options(num_cpus=0, max_restarts=0, scheduling_strategy=pinned).remote()
    return relay


def _wait(ref: Any, what: str, deadline: float) -> Any:
    try:
        return cluster.wait([ref], what=what, timeout=max(0.0, deadline - time.monotonic()))[0]
    except ray.exceptions.ActorUnschedulableError as error:
        raise ClusterError(what, "the node left the cluster", "the same command resumes the run on the nodes that are left") from error
