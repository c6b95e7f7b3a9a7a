"""Progress of long work on standard error: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
        self.rates: list[dict[str, Any]] = []
        """Of each training since :meth:`taken`: its title, inputs, seconds."""
        self.live = (sys.stderr.isatty() if live is None else live) and not quiet

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def taken(self) -> list[dict[str, Any]]:
        """:attr:`rates`, which are empty then."""
        rates, self.rates = self.rates, []
        return rates

    @contextmanager
    def training(self, title: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
        """Report steps: the yielded function takes (step, loss, inputs), the loss None where there is none, ``inputs`` all of this call so
        far; a step is one input where they are left out."""
        started = time.monotonic()
        average: float | None = None
        done = 0

        def text(step: int) -> str:
            seconds = time.monotonic() - started
            left = seconds / max(1, step - start) * (total - step)
            loss = "" if average is None else f"  loss {average:.4f}"
            rate = f"  {done / seconds:.3g} inputs/s" if done and seconds else ""
            return f"{title}: step {step}/{total}{loss}{rate}  {clock(seconds)} gone, {clock(left)} left"

        def smooth(step: int, loss: float | None, inputs: int | None = None) -> None:
            nonlocal average, done
            done = step - start if inputs is None else inputs
            if loss is not None:
                average = loss if average is None else 0.98 * average + 0.02 * loss

        if self.quiet:
            yield smooth
        elif self.live:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            bars = Bars(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True)
            with bars:
                task = bars.add_task(text(start), total=total, completed=start)

                def draw(step: int, loss: float | None, inputs: int | None = None) -> None:
                    smooth(step, loss, inputs)
                    bars.update(task, completed=step, description=text(step))

                yield draw
            self.say(text(total))
        else:
            said = started

            def line(step: int, loss: float | None, inputs: int | None = None) -> None:
                nonlocal said
                smooth(step, loss, inputs)
                if time.monotonic() - said > PLAIN_SECONDS or step == total:
                    said = time.monotonic()
                    self.say(text(step))

            yield line
        seconds = time.monotonic() - started
        if done:
            self.rates.append({"title": title, "inputs": done, "seconds": round(seconds, 2), "inputs_per_second": float(f"{done / seconds:.3g}")})


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
