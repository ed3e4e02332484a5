"""Near-duplicates within a problem set, and overlap with evaluation sets: MinHash finds candidates, n-grams decide.

Owns shingles and the two comparisons. MinHash and its buckets are `rensa`'s.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

PERMUTATIONS = 128
SEED = 7

_WORD = re.compile(r"\w+|[^\w\s]")

Shingles = frozenset[tuple[str, ...]]


def shingles(text: str, ngram: int, *, images: Sequence[str] = ()) -> Shingles:
    """Word n-grams of `text`, case and spacing ignored, punctuation marks counted as words (`a+b` is not `a-b`).

    A text of fewer words is one shingle. Every shingle of a problem with images carries their hashes: the same words under another
    picture are another problem.
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return frozenset((*images, *words[start : start + ngram]) for start in range(max(1, len(words) - ngram + 1)))


def near_duplicates(texts: Sequence[Shingles], threshold: float) -> dict[int, tuple[int, float]]:
    """Texts like an earlier one that is no duplicate itself: index -> (that text, Jaccard similarity, at least `threshold`)."""
    from rensa import RMinHash, RMinHashLSH

    buckets = RMinHashLSH(threshold, PERMUTATIONS, _bands(threshold))
    found: dict[int, tuple[int, float]] = {}
    for index, text in enumerate(texts):
        signature = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        signature.update(["\x1f".join(shingle) for shingle in sorted(text)])
        alike = [(_jaccard(text, texts[other]), other) for other in sorted(buckets.query(signature))]
        best = max(alike, key=lambda pair: pair[0], default=(0.0, -1))
        if best[0] >= threshold:
            found[index] = (best[1], best[0])
        else:
            buckets.insert(index, signature)
    return found


def overlaps(texts: Sequence[Shingles], evaluation: Sequence[Shingles], share: float) -> dict[int, tuple[int, float]]:
    """Texts of which one evaluation text holds at least `share` of the shingles: index -> (that text, the share)."""
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, text in enumerate(evaluation):
        for shingle in text:
            holders[shingle].append(index)
    found = {}
    for index, text in enumerate(texts):
        common = Counter(other for shingle in text for other in holders.get(shingle, ()))
        if common:
            other, count = max(common.items(), key=lambda item: (item[1], -item[0]))
            if count / len(text) >= share:
                found[index] = (other, count / len(text))
    return found


def _bands(threshold: float) -> int:
    """The fewest bands that let a pair at `threshold` be missed once in a thousand times; 1 - (1 - t^rows)^bands."""
    divisors = [bands for bands in range(1, PERMUTATIONS + 1) if PERMUTATIONS % bands == 0]
    return next((bands for bands in divisors if (1 - threshold ** (PERMUTATIONS // bands)) ** bands <= 1e-3), PERMUTATIONS)


def _jaccard(left: Shingles, right: Shingles) -> float:
    return len(left & right) / len(left | right)
