"""The supervised loop: fill rows with conversations, step; phase after phase, then on until the gate passes.

Owns steps, gate and resume position. Consumes tokenised conversations, produces trained weights in the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bregman.data.packing import pack_rows
from bregman.data.rows import RowFiller
from bregman.engines.schedule import learning_rate
from bregman.errors import GateError
from bregman.protocols import Learner, MiniBatch, Tracker
from sft.config import GateConfig
from sft.loss import sft_loss
from sft.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop drives. `save(step, state)` writes a checkpoint from which `step` is next; `gate(step)` returns the value of
    the gate's metric for the present weights."""

    learner: Learner
    tracker: Tracker
    save: Callable[[int, Mapping[str, Any]], None]
    gate: Callable[[int], float]


def train(
    streams: Sequence[Stream], parts: Parts, *, gate: GateConfig | None = None, first: int = 0, state: Mapping[str, Any] | None = None
) -> None:
    """Train through all `streams`, one per phase, from step `first`; `state` is what the checkpoint of that step kept.

    Raises:
        GateError: the gate has not passed after `max_extensions` extensions.
    """
    step, planned, last = first, 0, len(streams) - 1
    filler = streams[last].filler(state if state and state["phase"] == last else None)
    for number, stream in enumerate(streams):
        begins, planned = planned, planned + stream.steps
        if step >= planned:
            continue
        resumed = state is not None and state["phase"] == number
        if number and not resumed:
            longest = f"conversations up to {stream.phase.max_length:,} tokens"
            parts.tracker.note(f"step {step}: phase {number + 1} of {len(streams)}, {longest}")
        filler = stream.filler(state if resumed else None)
        _run(stream, filler, parts, range(step, planned), begins, planned, {"phase": number, "extension": 0})
        step = planned
    extension = int(state["extension"]) if state else 0
    filler.extend()
    while gate is not None:
        begins, ends = planned + (extension - 1) * gate.extend_steps, planned + extension * gate.extend_steps
        _run(streams[last], filler, parts, range(step, ends), begins, ends, {"phase": last, "extension": extension})
        step = max(step, ends)
        if _gate_passes(gate, parts.gate(step), step, extension, parts.tracker):
            return
        extension += 1


def _run(stream: Stream, filler: RowFiller, parts: Parts, steps: range, begins: int, ends: int, place: Mapping[str, Any]) -> None:
    """Train the given steps; the schedule runs from step `begins` to step `ends`. `place` goes into checkpoints.

    The rows of the next step are read, and their images encoded, while the learner works on this one.
    """
    with ThreadPoolExecutor(1, "rows") as reader:
        coming = reader.submit(next_step, stream, filler, parts.learner.num_ranks) if steps else None
        for step in steps:
            assert coming is not None
            prepared = coming.result()
            coming = reader.submit(next_step, stream, filler, parts.learner.num_ranks) if step + 1 < steps.stop else None
            rate = learning_rate(stream.phase.learning_rate, stream.phase.schedule, step - begins, ends - begins)
            stats = parts.learner.step(prepared.minibatch, sft_loss, rate)
            metrics = {
                "loss": stats.loss,
                "grad_norm": stats.grad_norm,
                "learning_rate": rate,
                "tokens_per_second": stats.num_tokens / stats.seconds,
                "pack_fill": prepared.fill,
            }
            opening = stream.facts if step == begins and not place["extension"] else {}
            parts.tracker.log(step, {**metrics, **opening})
            parts.save(step + 1, {**place, **prepared.state})


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A step's micro-batches, how full their rows are (1: no token of capacity is left), and the filler's state behind them."""

    minibatch: MiniBatch
    fill: float
    state: Mapping[str, Any]


def next_step(stream: Stream, filler: RowFiller, num_ranks: int) -> Prepared:
    """The rows of the next step, normalised by their trained tokens."""
    rows = [[stream.example(draw) for draw in row] for row in filler.step(stream.rows.capacity, stream.rows.count)]
    tokens = [sum(len(example.token_ids) for example in row) for row in rows]
    trained = sum(int(example.loss_mask.sum()) for row in rows for example in row)
    return Prepared(
        minibatch=pack_rows(rows, normalizer=float(trained), num_ranks=num_ranks),
        fill=sum(tokens) / sum(max(stream.rows.capacity, count) for count in tokens),
        state=filler.state_dict(),
    )


def _gate_passes(gate: GateConfig, value: float, step: int, extension: int, tracker: Tracker) -> bool:
    bounds = [f"at least {gate.at_least:g}"] if gate.at_least is not None else []
    bounds += [f"at most {gate.at_most:g}"] if gate.at_most is not None else []
    wanted = f"gate `{gate.metric}` is {value:.3f}, wanted {' and '.join(bounds)}"
    if gate.passes(value):
        tracker.note(f"step {step}: {wanted}: passed")
        return True
    if extension >= gate.max_extensions:
        raise GateError(
            "gate",
            f"after {step} steps {wanted}",
            "train longer (steps, gate.max_extensions), change the data or the learning rate, or try another seed",
        )
    tracker.warn(f"step {step}: {wanted}; training {gate.extend_steps} more steps")
    return False
