"""Names of stages -> their classes, imported when asked for, so that the command line starts fast."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINTS = "pocketbert.methods"

BUILT_IN = {
    "finetune": "pipeline.stages.finetune:Finetune",
    "adopt": "pipeline.stages.adopt:Adopt",
    "prune-vocab": "pipeline.methods.prune.vocab:PruneVocab",
    "distill-mobilebert": "pipeline.methods.distill.mobilebert:DistillMobilebert",
    "factorize-embeddings": "pipeline.methods.factorize.embeddings:FactorizeEmbeddings",
    "factorize-svd": "pipeline.methods.factorize.svd:FactorizeSvd",
    "factorize-flop": "pipeline.methods.factorize.flop:FactorizeFlop",
    "prune-magnitude": "pipeline.methods.prune.magnitude:PruneMagnitude",
    "prune-heads": "pipeline.methods.prune.heads:PruneHeads",
    "prune-gates": "pipeline.methods.prune.gates:PruneGates",
    "prune-neurons": "pipeline.methods.prune.neurons:PruneNeurons",
    "prune-proximal": "pipeline.methods.prune.proximal:PruneProximal",
    "layerdrop": "pipeline.methods.prune.layerdrop:Layerdrop",
    "share-layers": "pipeline.methods.share.layers:ShareLayers",
    "quaternion": "pipeline.methods.share.quaternion:QuaternionLayers",
    "export": "pipeline.stages.export:Export",
    "quantize": "pipeline.stages.quantize:Quantize",
    "tune": "pipeline.stages.tune:Tune",
    "bench": "pipeline.stages.bench:Bench",
    "pack": "pipeline.stages.pack:Pack",
}


def stage_names() -> list[str]:
    return [*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))]


def stage_class(name: str) -> type[Any]:
    """The :class:`pipeline.flow.stage.Stage` registered under ``name``; KeyError if there is none."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    raise KeyError(name)
