"""A causal language model as a policy: a pack of sequences in, log-probabilities of its tokens out.

Owns the call into the Hugging Face model and its head. Sharding it is the engines' business.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from bregman.models.attention import Context, boundary_arguments
from bregman.models.logprobs import aligned, next_token_logprobs, token_logprobs

IMAGE_ARGUMENTS = ("pixel_values", "image_grid", "image_positions", "image_rows")
"""Fields of a `PackedBatch` that reach the body of a vision-language model by the same name."""


class PolicyModel(nn.Module):
    """Wraps a causal LM so that its head runs inside this module's forward, where FSDP has gathered the weights.

    Args:
        model: a `...ForCausalLM` that uses `bregman.models.attention`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        boundaries: torch.Tensor,
        temperature: float = 1.0,
        context: Context | None = None,
        **images: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probability of each token given the tokens before it in its own sequence; float32 [T], 0 at first tokens.

        Args:
            token_ids: int64 [T].
            position_ids: int64 [T].
            boundaries: int32 [S + 1], cumulative sequence lengths.
            temperature: logits are divided by it.
            context: this rank's part of the pack, where several ranks share it; all of them get the whole result.
            images: `IMAGE_ARGUMENTS`, all of them or none.

        Raises:
            ValueError: images for a text model, which would not look at them.
        """
        if images and not hasattr(self.model, "body"):
            raise ValueError(f"the pack has images and {type(self.model).__name__} is a text model")
        body = getattr(self.model, "body", self.model.base_model)
        next_ids = token_ids.roll(-1)
        arguments = boundary_arguments(boundaries)
        if context is not None:
            token_ids, position_ids, next_ids = (context.take(values) for values in (token_ids, position_ids, next_ids))
            arguments, images = {"context": context}, context.take_images(images)
        output = body(input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, **arguments, **images)
        logprobs = next_token_logprobs(output.last_hidden_state[0], self.model.get_output_embeddings(), next_ids, temperature)
        return aligned(logprobs if context is None else context.gather(logprobs), boundaries)


@torch.no_grad()
def packing_error(policy: PolicyModel) -> float:
    """Largest difference, in nats, between log-probabilities of two short sequences packed and of each run alone through the
    model's own forward. More than rounding means that the architecture leaks across a pack, ignores positions, or changes its
    logits after the head."""
    device = next(policy.parameters()).device
    sequences = [torch.arange(n, device=device) * 7 % policy.model.config.get_text_config().vocab_size for n in (5, 3)]
    boundaries = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(len(s), device=device) for s in sequences])
    packed = policy(torch.cat(sequences), positions, boundaries)
    alone = []
    for sequence in sequences:
        ends = torch.tensor([0, len(sequence)], dtype=torch.int32, device=device)
        logits = policy.model(input_ids=sequence[None], use_cache=False, **boundary_arguments(ends)).logits[0]
        alone.append(token_logprobs(logits, sequence, ends))
    return float((packed - torch.cat(alone)).abs().max())
