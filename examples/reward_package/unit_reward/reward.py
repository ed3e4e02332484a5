"""A reward for answers that are a length: `1.5 km` is right where the gold answer is `1500 m`.

Owns the units and the verdict; an example of a reward that is installed as a package.
"""

import re

from rewards.sample import RewardSample, single_sample

METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0}
_LENGTH = re.compile(r"(-?\d+(?:\.\d+)?)\s*(mm|cm|m|km)")


@single_sample
def unit_answer(sample: RewardSample, tolerance: float = 1e-6, no_unit: float = 0.0) -> float | None:
    """1.0 where answer and gold answer are the same length, `no_unit` for the right number without a unit, else 0.0.

    None where the gold answer is not a length. `tolerance` is relative.
    """
    gold = _LENGTH.fullmatch(str(sample.answer).strip())
    if gold is None:
        return None
    given = _LENGTH.fullmatch(sample.final)
    if given is None:
        return no_unit if sample.final == gold[1] else 0.0
    difference = float(given[1]) * METRES[given[2]] - float(gold[1]) * METRES[gold[2]]
    return float(abs(difference) <= tolerance * abs(float(gold[1]) * METRES[gold[2]]))
