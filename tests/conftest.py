"""What every test starts from: a cache folder of its own, so that no run of the tests sees or leaves tokenised data elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("BREGMAN_CACHE")
    os.environ["BREGMAN_CACHE"] = str(tmp_path_factory.mktemp("bregman_cache"))
    yield
    if before is None:
        del os.environ["BREGMAN_CACHE"]
    else:
        os.environ["BREGMAN_CACHE"] = before
