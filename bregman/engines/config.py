"""Settings of the cluster, the rollout engine, the learner and the optimizer.

Owns numbers and their checks; imports neither ray nor vllm nor torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from bregman.config import Config


class ClusterConfig(Config):
    """How many workers, where, and how long to wait for them."""

    address: str = Field("local", description="`local` starts Ray here, `auto` joins a running cluster, or ray://host:port")
    learner_workers: PositiveInt = Field(1, description="learner ranks, one per GPU (or CPU process)")
    rollout_workers: PositiveInt = Field(1, description="vLLM engines")
    reward_workers: PositiveInt = Field(1, description="processes that run reward functions")
    gpus_per_rollout_worker: NonNegativeFloat = Field(0, description="GPUs of one engine; its tensor-parallel size if > 1")
    gpus_per_learner_worker: NonNegativeFloat = 0
    gpu_memory_gib: PositiveFloat | None = Field(None, description="memory of one GPU, for the plan that `check` prints")
    start_timeout: PositiveFloat = Field(300.0, description="seconds for a worker to come up")
    step_timeout: PositiveFloat = Field(3600.0, description="seconds for one call to a worker")


class EngineConfig(Config):
    """vLLM settings; the defaults are measured for small models on a CPU."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: PositiveInt = Field(description="tokens of prompt and response together")
    max_num_seqs: PositiveInt = Field(256, description="responses decoded at once")
    max_num_batched_tokens: PositiveInt = 8192
    kv_cache_mib: PositiveInt | None = Field(128, description="KV cache; null lets vLLM profile the GPU")
    gpu_memory_utilization: PositiveFloat = Field(0.9, le=1.0)
    enforce_eager: bool = Field(True, description="no compilation and no CUDA graphs: fast start, slower decode on a GPU")
    weight_sync: Literal["auto", "shared_memory", "relay"] = Field(
        "auto", description="`shared_memory`: engines on the node of learner rank 0 only; `relay`: by a copy per node; `auto`: as needed"
    )


class SamplingConfig(Config):
    """How responses are drawn."""

    num_samples: PositiveInt = Field(8, description="responses per problem (k)")
    max_tokens: PositiveInt = Field(description="longest response")
    temperature: NonNegativeFloat = 1.0
    top_p: PositiveFloat = Field(1.0, le=1.0)
    stop_on_repetition: bool = Field(False, description="vLLM's repetition detection ends looping responses early")


class LearnerConfig(Config):
    """How the model is trained, whatever the loss."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: weights and optimizer stay float32")
    tokens_per_micro_batch: PositiveInt = Field(8192, description="token budget of one forward pass of one rank")
    activation_checkpointing: bool = False
    context_parallel: PositiveInt = Field(
        1, description="ranks that share the tokens of a micro-batch; cluster.learner_workers is a multiple of it"
    )
    threads: PositiveInt = Field(1, description="CPU threads of one learner rank")


ModelPart = Literal["vision_tower", "projector", "language_model"]
"""Parts of a vision-language model; a text model is all `language_model`."""


class _OptimizerConfig(Config):
    learning_rate: PositiveFloat
    learning_rates: dict[ModelPart, PositiveFloat] = Field(
        default_factory=dict, description="rates of parts that have their own; schedules scale them like `learning_rate`"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    eps: PositiveFloat = Field(1e-8, description="of AdamW")
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


class AdamWConfig(_OptimizerConfig):
    kind: Literal["adamw"] = "adamw"


class MuonConfig(_OptimizerConfig):
    """Muon on matrices, with updates of AdamW's size so that AdamW's rates and decay carry over; AdamW on embeddings, the output
    head, norms and biases (Moonlight, arXiv 2502.16982)."""

    kind: Literal["muon"] = "muon"
    weight_decay: NonNegativeFloat = Field(0.1, description="Moonlight sec. 2.2")
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = 5


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class ModelTraining(Config):
    """What of the model a training stage trains and overrides; SFT and RL stages have these keys."""

    train: list[ModelPart] | None = Field(None, min_length=1, description="parts that train; the others stay as they are; null: all")
    rope_theta: PositiveFloat | None = Field(None, description="base of the rotary embedding from this stage on (context extension)")
    max_position_embeddings: PositiveInt | None = Field(None, description="window of the model from this stage on (context extension)")
    router_bias_rate: NonNegativeFloat = Field(
        0.0, description="mixture of experts: step of the router correction bias towards an even load, per optimizer step; 0 keeps it"
    )


class ScheduleConfig(Config):
    """Learning rate over the steps of a stage, as shares of the optimizer's `learning_rate`."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, then a linear decay")
    warmup_steps: NonNegativeInt = 0
    decay_share: PositiveFloat = Field(0.2, le=1.0, description="wsd only: share of the steps after the warm-up that decay")
    final_ratio: NonNegativeFloat = Field(0.1, le=1.0, description="rate at the last step over the peak")


class CheckpointConfig(Config):
    every: PositiveInt = Field(10, description="iterations (RL) or optimizer steps (SFT) between checkpoints")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
