"""Amounts that several stages have as options, with the bounds beyond which they cannot be meant."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

FEWEST_EPOCHS = 1e-3


def _none_or_some(epochs: float) -> float:
    if 0 < epochs < FEWEST_EPOCHS:
        raise ValueError(f"fewer than {FEWEST_EPOCHS:g} passes teach nothing; give more, or 0 where the stage can do without")
    return epochs


Epochs = Annotated[float, Field(le=10_000), AfterValidator(_none_or_some)]
"""Passes over the training inputs."""
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
"""Inputs per step."""
LearningRate = Annotated[float, Field(gt=0, le=10)]
"""Peak learning rate."""
