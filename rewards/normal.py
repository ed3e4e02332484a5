"""Characters that mean the same: digits of every script, typographic signs, vulgar fractions, superscripts.

Owns characters only; what an answer means is decided by the rewards that use this.
"""

from __future__ import annotations

import re
import unicodedata

SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "﹣": "-", "‐": "-", "‑": "-", "٫": ".", "٬": ",", "，": ",", "．": ".", "：": ":", "（": "(",
        "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "％": "%", "٪": "%", "＝": "=", "＋": "+", "／": "/", "\u00a0": " ",
        "\u2009": " ", "\u202f": " ", "\u3000": " ", "\u200b": "", "\ufeff": "", "’": "'", "‘": "'", "“": '"', "”": '"', "⁄": "/",
    }
)  # fmt: skip

SYMBOLS = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "°": r"^{\circ}", "≈": r"\approx ",
        "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    }
)  # fmt: skip

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")


def plain_characters(text: str) -> str:
    """`text` with digits of any script and full-width letters as ASCII, and typographic signs as their plain ones."""
    if text.isascii():
        return text
    return "".join(_plain(character) for character in text.translate(SIGNS))


def latex_characters(text: str) -> str:
    """`plain_characters` with mathematical characters written in LaTeX: `x²` is `x^{2}`, `1¾` is `1\\frac{3}{4}`."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    return plain_characters(text.translate(SYMBOLS))


def _plain(character: str) -> str:
    if character.isascii():
        return character
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    return chr(ord(character) - 0xFEE0) if "\uff01" <= character <= "\uff5e" else character
