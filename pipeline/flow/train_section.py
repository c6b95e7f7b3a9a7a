"""The ``[train]`` section of a recipe: how training fits the machine. Nothing here changes what is learned, but for rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainSection(BaseModel):
    """What fine-tuning, transfer, distillation and healing share."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models train and teachers answer; ``auto`` takes a GPU where there is one."""
    micro_batch: int | None = Field(None, ge=1)
    """Inputs that a step computes at a time; the step is that of the whole batch. For less memory at the price of a second forward pass."""
    activation_checkpointing: bool = False
    """Keep what enters a layer alone and compute the layer again for its gradient: less memory, a second forward pass."""
    cache_gb: float = Field(50.0, ge=0)
    """Gigabytes (10^9 bytes) that a teacher's outputs for one set of inputs may take on disk; beyond it the teacher runs at every step."""
