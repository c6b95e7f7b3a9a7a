"""How a runtime is to run one model file: threads, graph optimization, memory, packed weights.

The manifest of a bundle carries these per file under ``session``; whoever made the bundle chose them by measurement.

- Every key may be left out, and then has the default of :class:`SessionOptions`; an unknown key is ignored.
- ``config`` holds entries of ONNX Runtime's session configuration. Only those of :data:`CONFIG_ENTRIES` are applied: some others
  make the runtime read or write files, and a bundle must not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtimes.errors import IntegrityError
from runtimes.manifest import shown

GRAPH_LEVELS = ("disabled", "basic", "extended", "all")
CONFIG_ENTRIES = ("session.intra_op.allow_spinning", "session.set_denormal_as_zero")
WEIGHT_CACHES = ("memory", "none")
MOST_THREADS = 1024


@dataclass(frozen=True)
class SessionOptions:
    """Options of one model file; the defaults are those of the runtimes, on one thread.

    Args:
        threads: threads within one inference.
        graph_optimization_level: ONNX only; one of :data:`GRAPH_LEVELS`.
        memory_pattern: ONNX only; plan the memory of a shape once and reuse the plan.
        memory_arena: ONNX only; keep freed memory for the next inference.
        config: ONNX only; entries of :data:`CONFIG_ENTRIES`, each "0" or "1".
        weight_cache: TFLite only; "memory" packs the weights once for all signatures, "none" once per signature.
    """

    threads: int = 1
    graph_optimization_level: str = "all"
    memory_pattern: bool = True
    memory_arena: bool = True
    config: Mapping[str, str] = field(default_factory=dict)
    weight_cache: str = "memory"

    @classmethod
    def read(cls, raw: Any, place: str) -> SessionOptions:
        """The options that a manifest gives; ``raw`` is None where it gives none.

        Raises:
            IntegrityError: naming ``place``, the key and its value, for a value that no runtime takes.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, dict):
            raise IntegrityError(f"{place}: session: {shown(raw)} is not a table of options")
        config = raw.get("config", {})
        if not isinstance(config, dict):
            raise IntegrityError(f"{place}: session.config: {shown(config)} is not a table of options")
        checks: dict[str, Callable[[Any], bool]] = {
            "threads": lambda value: type(value) is int and 1 <= value <= MOST_THREADS,
            "graph_optimization_level": lambda value: value in GRAPH_LEVELS,
            "memory_pattern": lambda value: type(value) is bool,
            "memory_arena": lambda value: type(value) is bool,
            "weight_cache": lambda value: value in WEIGHT_CACHES,
        }
        known = {key: value for key, value in raw.items() if key in checks}
        entries = {key: value for key, value in config.items() if key in CONFIG_ENTRIES}
        wrong = [(key, value) for key, value in known.items() if not checks[key](value)]
        wrong += [(f"config.{key}", value) for key, value in entries.items() if value not in ("0", "1")]
        if wrong:
            raise IntegrityError(f"{place}: session.{wrong[0][0]}: {shown(wrong[0][1])} is nothing that a runtime takes")
        return cls(**known, config=entries)

    def as_manifest(self, file_format: str) -> dict[str, Any]:
        """What a manifest, or a job of the agent, says of a file of this format: the keys that concern it."""
        if file_format != "onnx":
            return {"threads": self.threads, "weight_cache": self.weight_cache}
        return {
            "threads": self.threads, "graph_optimization_level": self.graph_optimization_level,
            "memory_pattern": self.memory_pattern, "memory_arena": self.memory_arena, "config": dict(sorted(self.config.items())),
        }  # fmt: skip
