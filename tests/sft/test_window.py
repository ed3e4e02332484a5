"""Long conversations: refused, skipped or cut, and counted."""

from __future__ import annotations

import numpy as np
import pytest

from bregman.errors import DataError
from bregman.types import ImagePatches, Sequence
from sft.window import truncate, window


class Store:
    name = "rows"

    def __init__(self, *shapes: tuple[int, int]) -> None:
        """(tokens, first trained token) of each example."""
        self.examples = [Sequence(token_ids=np.arange(n), loss_mask=np.arange(n) >= first) for n, first in shapes]
        self.lengths = np.asarray([n for n, _ in shapes])
        self.untrained = np.asarray([first for _, first in shapes])

    def where(self, index: int) -> str:
        return f"rows row {index}"

    def __getitem__(self, index: int) -> Sequence:
        return self.examples[index]


STORE = Store((5, 2), (20, 3), (30, 12), (10, 4))


def test_error_names_the_longest_row():
    with pytest.raises(DataError, match=r"rows row 2: 30 tokens, max_length is 10 \(2 of 4 conversations are longer\); set max_length: 30"):
        window(STORE, 10, "error")
    assert window(STORE, 30, "error").skipped == 0


def test_skip():
    view = window(STORE, 10, "skip")
    assert (view.lengths.tolist(), view.skipped, view.truncated) == ([5, 10], 2, 0)
    assert len(view[1].token_ids) == 10
    with pytest.raises(DataError, match="no conversation is left"):
        window(STORE, 4, "skip")


def test_truncate_keeps_the_mask_and_skips_what_would_train_nothing():
    view = window(STORE, 10, "truncate")
    assert (view.lengths.tolist(), view.skipped, view.truncated) == ([5, 10, 10], 1, 1)
    assert len(view.lengths) + view.skipped == 4
    cut = view[1]
    assert cut.token_ids.tolist() == list(range(10)) and cut.loss_mask.tolist() == [False] * 3 + [True] * 7
    assert cut.token_ids[-1] == 9  # no end token was put there


@pytest.mark.parametrize(("length", "kept", "images"), [(20, 20, 2), (15, 15, 2), (13, 11, 1), (8, 8, 1), (5, 3, 0), (2, 2, 0)])
def test_images_are_cut_whole(length, kept, images):
    patches = [ImagePatches(pixels=np.zeros((n, 3, 1, 1), np.float32), grid=(1, n), num_tokens=n) for n in (4, 3)]
    whole = Sequence(
        token_ids=np.arange(20),
        loss_mask=np.arange(20) >= 1,
        images=tuple(patches),
        image_positions=np.asarray([3, 4, 5, 6, 11, 12, 13]),
    )
    cut = truncate(whole, length)
    assert len(cut.token_ids) == len(cut.loss_mask) == kept and cut.images == whole.images[:images]
    assert sum(image.num_tokens for image in cut.images) == (0 if cut.image_positions is None else len(cut.image_positions))
