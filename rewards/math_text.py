"""What is done to a final answer before math-verify sees it: one way of writing for what has many, and a refusal of what would hang it.

Owns text rules. Equality is `rewards.math_answer`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import log10

from rewards.normal import latex_characters

DEEPEST = 30
"""Brackets within brackets; beyond it an answer is not parsed."""
LARGEST_EXPONENT = 5
"""Digits of an exponent that is written as a number; from so many on an answer is not parsed."""

_SEPARATOR = r"(?:,|\{,\}|,\\!|\\[,;:! ]|~| )"
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}({_SEPARATOR})\d{{3}}(?:\1\d{{3}})*(?![\d])")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox)\s*\{([^{}]*)\}")

_BURIED = re.compile(rf"(?:[(\[{{]\s*){{{DEEPEST + 1}}}")
_COSTLY = re.compile(
    "|".join(
        [
            rf"\^\s*\{{?\s*[-(]*\d{{{LARGEST_EXPONENT},}}",
            r"(?:\^\s*(?:\{[^{}^]*|\d+|\w)\s*){3}",  # a tower of powers
            r"[)\]]\s*\^\s*\{?\s*(?:[2-9]\d\d|\d{4})",  # a sum multiplied out
            r"\d{4,}\s*\)*\s*!|!\s*[)}\]]*\s*!|\d\s*\^\s*\{?\(?\d[^!]*[)}]\s*!",
            r"binom\s*\{?\d{5}",
            r"\\(?:i{1,2}|o)?int(?![a-z])",
        ]
    )
)
_TOWER = re.compile(r"\^\s*\{?\(?(\d+)\s*\^\s*\{?(\d+)")


def normal_form(text: str) -> str:
    r"""`text` in the form that math-verify reads: `1 234 567` is `1234567`, `½` is `\frac{1}{2}`, `]0,1]` is `(0,1]`, `1.2e3` is
    `1.2 \times 10^{3}`, `0.\overline{3}` is `\frac{1}{3}`, `50 percent` is `50\%`.
    """
    text = latex_characters(text).strip().rstrip(".").strip()
    for opening, closing in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inside = text[len(opening) : len(text) - len(closing)].strip()
            text = inside if inside.count(opening) == 0 else text
    text = text.replace("**", "^").replace(r"\varnothing", r"\emptyset").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    if (match := _WRAPPED.fullmatch(text)) is not None:
        text = match[1].strip().rstrip(".").strip()
    text = re.sub(r"^(?:about|approximately|roughly|\\approx)\s+", "", text)
    text = re.sub(r"(?<=[\d}])\s*(?:\\text\{\s*percent\s*\}|percent)$", r"\\%", text)
    text = re.sub(r"(?<=\d)\s*(?:\\text\{\s*degrees?\s*\}|degrees?)$", r"^{\\circ}", text)
    text = re.sub(r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    if (match := _THOUSANDS.search(text)) is not None and _one_number(text, match):
        text = text.replace(match[0], re.sub(r"\D", "", match[0]))
    text = re.sub(r"^([-+]?[\d.]+)[eE]([-+]?\d{1,4})$", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d{1,9})\}", _repeating, text)
    match = re.fullmatch(r"([\[\]])([^\[\](){}]*,[^\[\](){}]*)([\[\]])", text)
    if match is not None and (match[1], match[3]) != ("[", "]"):
        text = ("[" if match[1] == "[" else "(") + match[2] + ("]" if match[3] == "]" else ")")
    return text


def key(text: str) -> str:
    """Two answers of the same key are the same as text: spacing, sizes of brackets and, in words, case do not count."""
    short = re.sub(r"\\left|\\right|\\[,;:! ]|\s+|~", "", _WRAPPED.sub(r"\1", text))
    return short.casefold() if re.fullmatch(r"[^\W\d_]{2,}", short) else short


def costly(text: str) -> bool:
    """Whether an answer could keep a computer algebra system busy: deep brackets, towers of powers, large factorials, integrals."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > DEEPEST:
            return True
    text = text.replace("**", "^")
    if _COSTLY.search(text):
        return True
    towers = ((int(low), int(high)) for low, high in _TOWER.findall(text) if len(low) < 9 and len(high) < 9)
    return any(low > 1 and high * log10(low) >= LARGEST_EXPONENT - 1 for low, high in towers)


def buried(text: str) -> bool:
    """Whether a whole text has brackets opened right within brackets, deeper than an answer may. Looser than `costly`: prose does not
    close every bracket that it opens."""
    return _BURIED.search(text) is not None


def sides(answer: str) -> list[str]:
    """The values that an answer claims to be equal: `2+3=5` is two, `x = 5` and `y = 2x + 1` are one; a list of equations is one."""
    if any(mark in answer for mark in (",", ";", "\\text", "\\begin", "&", "<", ">", " or ", " and ")):
        return [answer]
    parts = [part.strip() for part in re.split(r"(?<![<>!:\\])=", answer)]
    if len(parts) == 1 or not all(parts):
        return [answer]
    values = parts[1:] if re.search("[A-Za-z]", parts[0]) else parts
    return values if len(values) > 1 else [answer]


def without_name(text: str) -> str:
    """`f(x) = 2x + 1` without what stands before the equality sign."""
    return re.sub(r"^\s*[A-Za-z]\s*(?:\(\s*[a-z]\s*\))?\s*=\s*(?=[^=]*$)", "", text)


def _one_number(text: str, match: re.Match[str]) -> bool:
    """Whether the digits make one number: a bare `1,000` does, `(1,000)` or `1,000,2` may be lists."""
    before, after = text[: match.start()], text[match.end() :]
    return not re.search(r"[\d,(\[{;]", before) and not re.match(r"\s*[,;)\]}\d]", after)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
