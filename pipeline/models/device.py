"""Which processor trains."""

from __future__ import annotations

import torch

from runtimes.errors import BadInput


def choose(name: str, processes: int = 1) -> torch.device:
    """The device that ``[train] device`` means here.

    Args:
        processes: of this run; several train on CPUs.

    Raises:
        BadInput: a GPU is asked for by name that torch does not see.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name in there:
        if processes > 1:
            raise BadInput(f"train.device: {name!r}, but this run has {processes} processes, which train on CPUs; start one process, or set \"cpu\"")
        if not there[name]:
            raise BadInput(f"train.device: {name!r}, but torch {torch.__version__} sees none; install torch for it, or set \"auto\" or \"cpu\"")
        return torch.device(name)
    if name == "auto" and processes == 1:
        return torch.device(next((kind for kind, is_there in there.items() if is_there), "cpu"))
    return torch.device("cpu")


def hardware(device: torch.device) -> str | None:
    """What kind of GPU ``device`` is, because its sums are rounded otherwise; None for the CPU."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return None if device.type == "cpu" else device.type
