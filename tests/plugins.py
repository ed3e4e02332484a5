"""Reward plugins used by tests."""


def token_parity(prompts, completions, completion_ids, **columns):
    """1 for an even sum of token ids, else 0: about half of any samples are right."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
