"""Units of measurement at the end of an answer: `42\\text{ cm}`, `12 m/s`, `3 apples`, `\\$5`.

Owns the table of units and their separation from the number. Comparing is `rewards.math_answer`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = {
    "length": "1:m meter meters metre metres, 1/100:cm centimeter centimeters centimetre centimetres, 1/1000:mm millimeter millimeters, "
    "1000:km kilometer kilometers kilometre kilometres, 127/5000:inch inches, 381/1250:ft foot feet, 1143/1250:yd yard yards, "
    "201168/125:mile miles",
    "mass": "1:g gram grams, 1000:kg kilogram kilograms, 1/1000:mg milligram milligrams, 1000000:tonne tonnes",
    "time": "1:s sec second seconds, 60:min minute minutes, 3600:h hr hrs hour hours, 86400:day days, 604800:week weeks, 1/1000:ms",
    "volume": "1:L l liter liters litre litres, 1/1000:mL ml milliliter milliliters",
    "money": "1:dollar dollars USD, 1/100:cent cents",
    "force": "1:N newton newtons",
    "energy": "1:J joule joules, 1000:kJ",
    "power": "1:W watt watts, 1000:kW",
}
_UNITS = {
    name: (Fraction(factor), dimension)
    for dimension, entries in _TABLE.items()
    for entry in entries.split(", ")
    for factor, _, names in [entry.partition(":")]
    for name in names.split()
}
_NUMBER = r"[-+]?(?:[\d.,\s/()^*+{}-]|\\[dt]?frac|\\sqrt|\\pi|\\cdot|\\times|\\le|\\right)*[\d)}.]|[-+]?(?:\d*\.?\d*\s*)?\\pi"
_SPLIT = re.compile(rf"({_NUMBER})(\s*)([A-Za-z][A-Za-z .]*(?:\^\{{?[23]\}}?)?(?:/[A-Za-z]+(?:\^\{{?[23]\}}?)?)?)")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit that is known.

    Attributes:
        factor: how many of the basic unit of its dimension it is.
        dimension: as `length`, `length^2`, `length/time`.
    """

    factor: Fraction
    dimension: str


def split_unit(text: str) -> tuple[str, Unit | None]:
    """The number, and the unit that follows it (a currency sign also before it).

    A single word that is no known unit (`3 apples`) is taken off all the same. Text that does not begin with a number is returned as it
    is: it may be algebra or words.
    """
    if text.startswith("\\$") and re.fullmatch(_NUMBER, text[2:].strip()):
        return text[2:].strip(), Unit(*_UNITS["dollar"])
    plain = re.sub(r"\\(?:text|textrm|mathrm|rm|operatorname|textit)\s*\{([^{}]*)\}", r" \1", text)
    plain = re.sub(r"\\[,;:! ]|~", " ", plain).strip()
    match = _SPLIT.fullmatch(plain)
    if match is None:
        return text, None
    number, space, words = match[1].strip(), match[2], match[3].strip().rstrip(".")
    unit = _unit(words)
    if unit is not None and (space or len(words) > 1):  # `5m` is five times m
        return number, unit
    return (number, None) if re.fullmatch("[A-Za-z]{3,}", words) and space else (text, None)


def _unit(words: str) -> Unit | None:
    above, _, below = words.partition("/")
    upper = _simple(above)
    if upper is None or not below:
        return upper
    lower = _simple(below)
    return None if lower is None else Unit(upper.factor / lower.factor, f"{upper.dimension}/{lower.dimension}")


def _simple(words: str) -> Unit | None:
    match = re.fullmatch(r"(?:(square|sq\.?|cubic|cu\.?)\s+)?([A-Za-z]+)(?:\^\{?([23])\}?)?", words.strip())
    if match is None or match[2] not in _UNITS:
        return None
    power = int(match[3]) if match[3] else {"s": 2, "c": 3}.get((match[1] or "x")[0], 1)
    factor, dimension = _UNITS[match[2]]
    return Unit(factor**power, dimension if power == 1 else f"{dimension}^{power}")
