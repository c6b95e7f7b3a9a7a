"""Cross-layer parameter sharing: several layers use one set of weights.

Source: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR,
arXiv:1909.11942 §3.1. Layer l of L belongs to group floor(l groups / L); all layers of a group share all their weights, or
those of the attention alone, or those of the FFNs alone (the paper's ablations; norms then stay each layer's own).
``embedding_rank`` factorizes the word table too, V x H into V x E and E x H.

ALBERT is trained so from the start. Here the model is trained already, and sharing destroys most of what its layers know, so:
each group starts as its first layer (or the mean of its layers, or its last), learns the old layers' feature maps and
attention (:mod:`pipeline.learning.knowledge_transfer`), then the old model's answers.

What it brings: fewer weights to store and to load. Not speed: every layer is computed as before.

Two things differ from ALBERT: its embedding norm and positions live in the narrow space, here they stay in the wide one,
where the trained ones fit; and there is no sentence-order prediction, because nothing is pre-trained.

Example: MiniLM, ``share = "all", groups = 2``: layers 0, 1, 2 become one and 3, 4, 5 another; 10.6 M parameters become 3.5 M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.stage import QUATERNIONS, SHARED_LAYERS, THIN_MATRICES, UNEQUAL_LAYERS, Context, Stage
from pipeline.learning.healing import Healing, leave
from pipeline.learning.knowledge_transfer import KnowledgeTransfer
from pipeline.methods.factorize.embeddings import factorize
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.surgery import probe_texts, require_same
from runtimes.errors import BadInput


class ShareLayers(Stage):
    """Let layers share their weights, ALBERT's way, and heal by distillation from the unshared model."""

    use: ClassVar[str] = "share-layers"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({SHARED_LAYERS})
    refuses: ClassVar[dict[str, str]] = {
        UNEQUAL_LAYERS: "layers must have the same shape to share weights; share first, or choose fewer layers with layerdrop",
        SHARED_LAYERS: "they share already",
        THIN_MATRICES: "the ranks differ from layer to layer; share first, or leave one of both out",
        QUATERNIONS: "share first, then make what is shared quaternion",
    }
    paper: ClassVar[str] = "Lan et al. 2020, ALBERT, arXiv:1909.11942"
    equations: ClassVar[str] = "Layer l of L uses the weights of group floor(l groups / L): all of them, or those of the attention or of the FFNs."
    effect: ClassVar[str] = "Fewer weights: smaller files; speed unchanged, every layer is computed as before."

    share: Literal["all", "attention", "ffn"] = "all"
    """What layers of a group have in common."""
    groups: int = Field(1, ge=1)
    """How many sets of weights there are."""
    start: Literal["first", "last", "mean"] = "first"
    """Which layer of a group its weights start as."""
    embedding_rank: int | None = Field(None, ge=1)
    """Width of a factorized word table; None leaves it as it is."""
    transfer: KnowledgeTransfer = KnowledgeTransfer(order="joint", epochs=4.0, learning_rate=3e-4)
    """How feature maps and attention of the model as it was are learned."""
    heal: Healing = Healing(epochs=4.0, learning_rate=3e-4)
    """How its outputs are learned after them; faster than after a cut, because more is to be learned again."""

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        count = len(unpruned.model.config.layers)
        if self.groups > count:
            raise BadInput(f"{self.use}.groups: {self.groups}, but the model has {count} layers")
        if unpruned.model.config.shares or any(layer != unpruned.model.config.layers[0] for layer in unpruned.model.config.layers):
            raise BadInput(f"{self.use}: the layers of this model differ in shape or share weights already")
        torch.manual_seed(context.seed)
        shared = share_layers(unpruned.model, self.share, self.groups, self.start)
        probes = probe_texts(context.encode(unpruned, "validation"))
        require_same(predict(untied(shared), probes), shared, probes, self.use)
        if self.embedding_rank is not None:
            shared = factorize(shared, self.embedding_rank)
        self.transfer.transfer(context, shared, unpruned, self.use, "model")
        self.heal.heal(context, shared, unpruned, f"{self.use}: healing")
        leave(context, unpruned, shared, f"{self.share} shared in {self.groups} group{'s' if self.groups > 1 else ''}")


def group_owners(layers: int, groups: int) -> list[int]:
    """For each layer the first layer of its group: group floor(l groups / layers)."""
    group = [layer * groups // layers for layer in range(layers)]
    return [group.index(g) for g in group]


def share_layers(model: Encoder, share: str, groups: int, start: str) -> Encoder:
    """The model with ``share`` of its layers shared within groups, each group starting as ``start`` says."""
    config, old = model.config, model.state_dict()
    owners = group_owners(len(config.layers), groups)
    key = {"all": "shared_with", "attention": "shared_attention", "ffn": "shared_ffn"}[share]
    made = Encoder(EncoderConfig(**config.to_dict() | {key: owners}))
    weights = {name: tensor for name, tensor in old.items() if not name.startswith("layers.")}
    for position, owner in enumerate(owners):
        members = [p for p, o in enumerate(owners) if o == owner]
        prefix = f"layers.{made.order[position]}."
        for name in (n.removeprefix(f"layers.{position}.") for n in old if n.startswith(f"layers.{position}.")):
            source = members if _shared(name, share) else [position]
            weights[prefix + name] = _start([old[f"layers.{member}.{name}"] for member in source], start)
    made.load_state_dict(weights)
    return made.eval()


def untied(model: Encoder) -> Encoder:
    """The same function with weights of its own for every layer."""
    own = list(range(len(model.config.layers)))
    made = Encoder(EncoderConfig(**model.config.to_dict() | {"shared_with": own, "shared_attention": own, "shared_ffn": own}))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    for position, index in enumerate(model.order):
        weights |= {f"layers.{position}.{name}": tensor for name, tensor in model.layers[index].state_dict().items()}
    made.load_state_dict(weights)
    return made.eval()


def _shared(name: str, share: str) -> bool:
    """Whether the tensor ``name`` of a layer is shared; of the FFNs alone it is the matrices, not the norms."""
    if share == "all":
        return True
    return name.startswith("attention.") if share == "attention" else name.startswith("ffns.") and ".norm." not in name


def _start(tensors: Sequence[Tensor], start: str) -> Tensor:
    if start == "mean":
        return torch.stack(list(tensors)).mean(0)
    return tensors[0 if start == "first" else -1].clone()
