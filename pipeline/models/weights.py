"""Read the weights of a model folder: one safetensors file, or several with an index. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.models.json_files import read_table
from runtimes.errors import BadInput

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the file of each tensor where a large model is stored in several."""


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All floating-point tensors of a folder, as float32.

    Raises:
        BadInput: no weights, pickled weights only, an index that does not fit its files, a file that is damaged.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        found = _tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else _from_shards(folder)
        return {name: tensor.float() for name, tensor in found.items() if tensor.is_floating_point()}
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise BadInput(
            f"model {folder}: only pickled weights ({pickled[0]}), which could run code when read; "
            f"save them again with save_pretrained(..., safe_serialization=True)"
        )
    raise BadInput(f"model {folder}: no weights; {WEIGHTS} is needed, or {INDEX} with the files that it names")


def shard_names(folder: Path) -> list[str]:
    """The files that the index of ``folder`` names, in order; none where there is no index or one file holds all.

    Raises:
        BadInput: an index that is damaged, or names a file outside the folder or one that is not there.
    """
    path = folder / INDEX
    if (folder / WEIGHTS).is_file() or not path.is_file():
        return []
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    placed = read_table(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise BadInput(f"model {path}: weight_map does not name a file for each tensor; fetch the file again")
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"model {path}: weight_map names {name!r}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise BadInput(f"model {folder}: {name} is missing, which {INDEX} names; fetch the model again, whole")
    return placed


def _from_shards(folder: Path) -> dict[str, torch.Tensor]:
    placed = _weight_map(folder)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(placed.values())):
        shard = _tensors(folder / name)
        missing = sorted(tensor for tensor, file in placed.items() if file == name and tensor not in shard)
        if missing:
            raise BadInput(f"model {folder / name}: tensor {missing[0]} is missing, which {INDEX} places there; fetch the model again")
        found |= shard
    return found


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"model {path}: not a safetensors file, or damaged: {error}; fetch it again") from error
