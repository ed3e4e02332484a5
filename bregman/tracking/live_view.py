"""The live view in a terminal, redrawn in the background so that a stuck wait is seen to be stuck.

Owns the drawing with rich; what it says comes from `console.Console`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

REDRAWS_PER_SECOND = 4


def start_live(stream: TextIO, snapshot: Callable[[], tuple[str, str, int, int, str]]) -> Live:
    """Start redrawing `snapshot()` (position, metrics, steps done, steps in all, wait) at the foot of the terminal."""

    def draw() -> RenderableType:
        title, metrics, done, total, wait = snapshot()
        lines: list[RenderableType] = []
        if title:
            lines.append(Text(title, style="bold"))
            lines.append(ProgressBar(total=max(total, done, 1), completed=done, width=40))
        if metrics:
            lines.append(Text(metrics))
        if wait:
            lines.append(Text(wait, style="dim"))
        return Group(*lines)

    console = Console(file=stream, force_terminal=True)
    live = Live(get_renderable=draw, console=console, refresh_per_second=REDRAWS_PER_SECOND, transient=True)
    live.start()
    return live
