"""Progress of long work on standard error: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 15.0
"""Seconds between two plain lines."""


class Progress:
    """Where stages report to.

    Args:
        quiet: say nothing at all.
        live: draw a bar; None asks whether standard error is a terminal.
    """

    def __init__(self, quiet: bool = False, live: bool | None = None) -> None:
        self.quiet = quiet
        self.live = (sys.stderr.isatty() if live is None else live) and not quiet

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    @contextmanager
    def training(self, title: str, total: int, start: int = 0) -> Iterator[Callable[[int, float | None], None]]:
        """Report steps: the yielded function takes (step, loss), None where there is no loss."""
        started = time.monotonic()
        average: float | None = None

        def text(step: int) -> str:
            seconds = time.monotonic() - started
            left = seconds / max(1, step - start) * (total - step)
            loss = "" if average is None else f"  loss {average:.4f}"
            return f"{title}: step {step}/{total}{loss}  {clock(seconds)} gone, {clock(left)} left"

        def smooth(loss: float | None) -> None:
            nonlocal average
            if loss is not None:
                average = loss if average is None else 0.98 * average + 0.02 * loss

        if self.quiet:
            yield lambda step, loss: None
        elif self.live:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            bars = Bars(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True)
            with bars:
                task = bars.add_task(text(start), total=total, completed=start)

                def draw(step: int, loss: float | None) -> None:
                    smooth(loss)
                    bars.update(task, completed=step, description=text(step))

                yield draw
            self.say(text(total))
        else:
            said = started

            def line(step: int, loss: float | None) -> None:
                nonlocal said
                smooth(loss)
                if time.monotonic() - said > PLAIN_SECONDS or step == total:
                    said = time.monotonic()
                    self.say(text(step))

            yield line


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
