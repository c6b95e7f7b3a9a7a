"""The stages by name."""

from __future__ import annotations

from runtimes.registry import Registry

STAGES = Registry("pocketbert.methods", {
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
})
"""Subclasses of :class:`pipeline.flow.stage.Stage`."""
