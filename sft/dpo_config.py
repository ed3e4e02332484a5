"""Settings of a preference-tuning stage."""

from __future__ import annotations

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from bregman.config import Config
from bregman.data.config import SourceConfig


class DPOConfig(Config):
    """Direct preference optimisation (arXiv 2305.18290) by TRL's DPOTrainer, as k1.5 sec. 2.4 uses it for long2short.

    The stage runs in one process on one device; its model must fit there twice.
    """

    pairs: SourceConfig = Field(description="rows of `prompt` (text or messages), `chosen` and `rejected` (texts)")
    epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = Field(16, description="pairs per optimizer step")
    micro_batch_size: PositiveInt = Field(16, description="pairs per forward pass; `batch_size` is a multiple of it")
    max_length: PositiveInt = Field(description="longest prompt with answer, in tokens; longer pairs are an error")
    beta: PositiveFloat = Field(0.1, description="weight of KL to the start model")
    learning_rate: PositiveFloat
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    sft_weight: float = Field(0.0, ge=0.0, description="weight of the NLL of the chosen answer beside the DPO loss (arXiv 2404.19733)")
    timeout: PositiveFloat = Field(86_400.0, description="seconds for the whole stage")

    @pydantic.model_validator(mode="after")
    def _whole_micro_batches(self) -> DPOConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})")
        return self
