"""Supervised sources of a stage, tokenised, with conversations over the limit counted and handled as the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bregman.data.chat import tokenize_conversations
from bregman.data.config import SourceConfig
from bregman.data.sources import read_conversations, source_name
from bregman.errors import DataError
from bregman.types import Sequence as TokenSequence
from sft.config import SFTConfig


def tokenised_sources(
    stage: SFTConfig, base: Path, tokenizer: Any, seed: int, warn: Callable[[str], None], resolve: Callable[[SourceConfig], SourceConfig]
) -> list[list[TokenSequence]]:
    """The examples of each source. `resolve` gives the file behind a `kind: stage` source.

    Raises:
        DataError: a row is malformed, is longer than `max_length` where the recipe says `too_long: error`, or none is left.
    """
    result = []
    for index, source in enumerate(stage.sources):
        conversations = read_conversations(resolve(source), base, seed=seed)
        sequences = tokenize_conversations(tokenizer, conversations)
        fitting = [sequence for sequence in sequences if len(sequence.token_ids) <= stage.max_length]
        if len(fitting) < len(sequences):
            longest = max(range(len(sequences)), key=lambda i: len(sequences[i].token_ids))
            length = len(sequences[longest].token_ids)
            if stage.too_long == "error":
                raise DataError(
                    f"{source_name(source)}: row {conversations[longest].id}",
                    f"{length} tokens, max_length is {stage.max_length}",
                    f"set max_length: {length}, or too_long: skip",
                )
            warn(f"{source_name(source)}: skipped {len(sequences) - len(fitting)} of {len(sequences)} conversations above max_length")
        if not fitting:
            raise DataError(f"sources[{index}] ({source_name(source)})", "no conversation is left", "raise max_length")
        result.append(fitting)
    return result
