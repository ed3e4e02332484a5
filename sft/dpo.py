"""Preference tuning: pairs -> token ids as every other stage makes them -> TRL's DPOTrainer -> a model folder.

Owns reading and tokenising pairs and the call into TRL. Where it runs is `recipes.model_stages`' business; how pairs are chosen
is in `long2short`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.data.chat import render_prompt, tokenize_conversation
from bregman.data.config import SourceConfig
from bregman.data.readers import read_rows
from bregman.errors import DataError
from sft.dpo_config import DPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Token ids of a prompt and of two answers to it, each with its end token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def read_pairs(source: SourceConfig, base: Path, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int) -> list[PreferencePair]:
    """Every row of `source` as a pair.

    Raises:
        DataError: naming the row: a column is missing, both answers are the same, one is empty or does not fit `max_length`, or the
            row has images.
    """
    rows = read_rows(source, base, seed)
    pairs = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        pair = _pair(row, where, tokenizer)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if length > max_length:
            raise DataError(where, f"{length} tokens, max_length is {max_length}", f"set max_length: {length}, or drop the row")
        pairs.append(pair)
    return pairs


def _pair(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> PreferencePair:
    for column in ("prompt", "chosen", "rejected"):
        if not row.get(column):
            raise DataError(where, f"needs `{column}`", "map it under `columns:`; a pair has prompt, chosen and rejected")
    if row.get("images"):
        raise DataError(where, "has images; preference tuning takes text only", "drop the row")
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else [dict(m) for m in row["prompt"]]
    answers = [_text(row[column], column, where) for column in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise DataError(where, "`chosen` and `rejected` are the same", "drop the row")
    prompt_ids = render_prompt(tokenizer, prompt, where)
    ids = []
    for answer in answers:
        sequence = tokenize_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}], where)
        end = int(sequence.loss_mask.nonzero()[0][-1]) + 1  # up to the end token: what a template writes after it is not the answer's
        ids.append(sequence.token_ids[len(prompt_ids) : end].tolist())
    return PreferencePair(prompt_ids=prompt_ids, chosen_ids=ids[0], rejected_ids=ids[1])


def _text(answer: Any, column: str, where: str) -> str:
    """An answer as text, also where it is written as TRL's one-message list."""
    if isinstance(answer, list | tuple) and len(answer) == 1 and isinstance(answer[0], Mapping):
        answer = answer[0].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(where, f"`{column}` is not a text", "give the answer as text, or as one assistant message")
    return answer


def train(config: DPOConfig, model: Path, output: Path, pairs: list[PreferencePair], *, seed: int, on_gpu: bool) -> list[dict[str, float]]:
    """Tune `model` (an HF folder) on `pairs` and leave the result in `output`; returns TRL's log, one dict per optimizer step.

    A run that was cut off goes on from TRL's last checkpoint in `output`'s sibling `trl`.

    Raises:
        DataError: the folder cannot be written, or TRL is not installed.
    """
    from bregman.models.loading import TOKENIZER_FILES, hide_cuda_builds

    hide_cuda_builds()
    import datasets
    import torch

    try:
        import trl
    except ImportError:
        raise DataError("stage of kind `dpo`", "TRL is not installed", "install the extra: pip install 'bregman[trl]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bregman.engines import checkpoint

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # tokenised already, by the functions that every other stage uses

    work = output.parent / "trl"
    steps = -(-len(pairs) // config.batch_size) * config.epochs
    arguments = trl.DPOConfig(
        output_dir=str(work),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        beta=config.beta,
        loss_type=["sigmoid", "sft"] if config.sft_weight else ["sigmoid"],
        loss_weights=[1.0, config.sft_weight] if config.sft_weight else None,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        max_length=config.max_length,
        seed=seed,
        logging_steps=1,
        save_steps=max(int(steps) // 4, 1),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    trainer = Trainer(model=policy, args=arguments, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=any(work.glob("checkpoint-*")) or None)
    checkpoint.export(output, policy, policy.state_dict(), model, TOKENIZER_FILES)
    shutil.rmtree(work, ignore_errors=True)
    return [{key: float(value) for key, value in entry.items()} for entry in trainer.state.log_history if "loss" in entry]
