"""One run in several processes: ``accelerate launch --multi_gpu --num_processes 2 -m pipeline.cli.main run ...``.

``--multi_gpu`` is accelerate's name for torch's launcher, which starts processes on CPUs as well; without it, accelerate starts a
single one where there is no GPU.

The first process does what a run does; the others train with it and otherwise wait. What passes between stages lies in the
cache, so the others find it there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

LONGEST_WAIT = timedelta(hours=24)
"""The others wait through stages that do not train."""


def count() -> int:
    """Number of processes of this run."""
    return _first_number(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def rank() -> int:
    """Number of this process, the first being 0."""
    return _first_number(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0)


def wait() -> None:
    """Until all processes have come here."""
    if count() > 1:
        _state().wait_for_everyone()


def told(value: Any) -> Any:
    """The first process' ``value``, in all processes."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    return broadcast_object_list([value])[0]


def _first_number(names: Sequence[str], default: int) -> int:
    """The launchers' ways of saying it, as accelerate reads them."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=LONGEST_WAIT)
