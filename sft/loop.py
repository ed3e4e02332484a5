"""The supervised loop: draw conversations, pack them, step; go on until the gate passes.

Owns steps, gate and resume position. Consumes tokenised conversations, produces trained weights in the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bregman.data.packing import pack
from bregman.engines.schedule import learning_rate
from bregman.errors import GateError
from bregman.protocols import Learner, MiniBatch, Tracker
from bregman.types import Sequence as TokenSequence
from sft.config import GateConfig, SFTConfig
from sft.loss import sft_loss


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop drives. `examples(n)` yields the mixture from its n-th example on, without end; `save(step, state)` writes a
    checkpoint from which `step` is next; `gate(step)` returns the value of the gate's metric for the present weights."""

    learner: Learner
    tracker: Tracker
    examples: Callable[[int], Iterator[TokenSequence]]
    save: Callable[[int, Mapping[str, Any]], None]
    gate: Callable[[int], float]


def train(config: SFTConfig, parts: Parts, *, tokens_per_micro_batch: int, first: int = 0, state: Mapping[str, Any] | None = None) -> None:
    """Train from step `first`; `state` is what the checkpoint of that step kept.

    Raises:
        GateError: the gate has not passed after `max_extensions` extensions.
    """
    drawn = int(state["drawn"]) if state else 0
    examples = Draw(parts.examples(drawn), drawn)
    step, extension = first, int(state["extension"]) if state else 0
    while True:
        end = config.steps + extension * (config.gate.extend_steps if config.gate else 0)
        while step < end:
            minibatch = next_minibatch(examples, config.tokens_per_step, tokens_per_micro_batch, parts.learner.num_ranks)
            rate = _learning_rate(config, step)
            stats = parts.learner.step(minibatch, sft_loss, rate)
            parts.tracker.log(
                step,
                {
                    "loss": stats.loss,
                    "grad_norm": stats.grad_norm,
                    "learning_rate": rate,
                    "tokens_per_second": stats.num_tokens / stats.seconds,
                },
            )
            step += 1
            parts.save(step, {"drawn": examples.count, "extension": extension})
        if config.gate is None or _gate_passes(config.gate, parts.gate(step), step, extension, parts.tracker):
            return
        extension += 1


class Draw:
    """An iterator over examples that counts what was taken and can be looked ahead into.

    Attributes:
        count: examples taken so far; the position from which a resumed run goes on.
    """

    def __init__(self, examples: Iterator[TokenSequence], count: int) -> None:
        self._examples = examples
        self._next: TokenSequence | None = None
        self.count = count

    def peek(self) -> TokenSequence:
        if self._next is None:
            self._next = next(self._examples)
        return self._next

    def take(self) -> TokenSequence:
        example, self._next = self.peek(), None
        self.count += 1
        return example


def next_minibatch(examples: Draw, tokens_per_step: int, tokens_per_micro_batch: int, num_ranks: int) -> MiniBatch:
    """The next examples that fit into `tokens_per_step` (at least one), packed; normalised by their trained tokens."""
    chosen = [examples.take()]
    total = len(chosen[0].token_ids)
    while total + len(examples.peek().token_ids) <= tokens_per_step:
        chosen.append(examples.take())
        total += len(chosen[-1].token_ids)
    trained = sum(int(example.loss_mask.sum()) for example in chosen)
    return pack(chosen, token_budget=tokens_per_micro_batch, normalizer=float(trained), num_ranks=num_ranks)


def _learning_rate(config: SFTConfig, step: int) -> float:
    """The schedule over the planned steps; each extension is a re-warmed run of it over its own steps."""
    if step < config.steps or config.gate is None:
        return learning_rate(config.optimizer.learning_rate, config.schedule, step, config.steps)
    length = config.gate.extend_steps
    return learning_rate(config.optimizer.learning_rate, config.schedule, (step - config.steps) % length, length)


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
