"""Quaternion layers: each weight serves in four places of its matrix.

Source: Tay, Zhang, Luu, Rao, Zhang, Wang, Fu, Hui 2019, "Lightweight and Efficient Neural Natural Language Processing with
Quaternion Networks", ACL, arXiv:1906.04393.

Features are taken as quaternions, r + x i + y j + z k, a quarter of the features each. A matrix of quaternions acts by the
Hamilton product (eq. 4), which as a real matrix has 4 x 4 blocks, but only four different ones::

    | W_r  -W_i  -W_j  -W_k |
    | W_i   W_r  -W_k   W_j |       a quarter of the weights, the same number of multiplications
    | W_j   W_k   W_r  -W_i |
    | W_k  -W_j   W_i   W_r |

A trained matrix is no such pattern: the nearest one (signed means of its blocks) keeps about a quarter of its energy. So
the layers start there, learn the dense layers' feature maps and attention, then the dense model's answers.

What it brings: layers with a quarter of the weights on disk and in memory; the exported files multiply by the four blocks as
they are. Not speed.

What this file does not do: quaternion attention with four score matrices, the paper's other half; attention itself stays as
it is. The authors' code multiplies by conjugates, which is the same after flipping the signs of W_i, W_j, W_k.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pipeline.flow.stage import QUATERNIONS, THIN_MATRICES, ZEROS, Context, Stage
from pipeline.learning.healing import Healing, leave
from pipeline.learning.knowledge_transfer import KnowledgeTransfer
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.linear import HAMILTON
from pipeline.models.surgery import layer_matrices, probe_texts, require_same
from runtimes.errors import BadInput


class QuaternionLayers(Stage):
    """Replace the matrices of the layers by quaternion ones with a quarter of the weights, and distil them from the dense model."""

    use: ClassVar[str] = "quaternion"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({QUATERNIONS})
    refuses: ClassVar[dict[str, str]] = {
        THIN_MATRICES: "a matrix cannot be a product of thin ones and a quaternion one at once; leave one of both out",
        QUATERNIONS: "they are quaternion matrices already",
        ZEROS: "the means of blocks that this starts from would fill the zeros; prune no single weights before",
    }
    paper: ClassVar[str] = "Tay et al. 2019, Quaternion Networks, arXiv:1906.04393"
    equations: ClassVar[str] = (
        "A matrix consists of 4 x 4 blocks of which only four differ, signed as in the Hamilton product of quaternions; it starts as the nearest "
        "such matrix to the trained one."
    )
    effect: ClassVar[str] = "A quarter of the layers' weights in files and memory; speed about unchanged, the multiplications stay."

    transfer: KnowledgeTransfer = KnowledgeTransfer(order="joint", epochs=6.0, learning_rate=5e-4)
    """How feature maps and attention of the model as it was are learned."""
    heal: Healing = Healing(epochs=4.0, learning_rate=5e-4)
    """How its outputs are learned after them; faster than after a cut, because more is to be learned again."""

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        torch.manual_seed(context.seed)
        model = to_quaternions(unpruned.model)
        probes = probe_texts(context.encode(unpruned, "validation"))
        require_same(predict(to_dense(model), probes), model, probes, self.use)
        names = layer_matrices(model)
        kept = [energy_kept(unpruned.model.get_submodule(n).weight.detach(), model.get_submodule(n).weight.detach()) for n in names]
        context.note(f"the nearest quaternion matrices keep {min(kept):.0%} to {max(kept):.0%} of the trained ones' energy")
        self.transfer.transfer(context, model, unpruned, self.use, "model")
        self.heal.heal(context, model, unpruned, f"{self.use}: healing")
        leave(context, unpruned, model, "quaternion layers")


def to_quaternions(model: Encoder) -> Encoder:
    """The model whose layers' matrices are the nearest quaternion ones.

    Raises:
        BadInput: a width that is no multiple of 4.
    """
    names = layer_matrices(model)
    weights = model.state_dict()
    odd = [name for name in names if any(size % 4 for size in weights[f"{name}.weight"].shape)]
    if odd:
        raise BadInput(f"quaternion: {odd[0]} is {tuple(weights[odd[0] + '.weight'].shape)}; all widths must be multiples of 4")
    made = Encoder(EncoderConfig(**model.config.to_dict() | {"quaternion": True}))
    own = made.state_dict()
    for name in own:
        source = name.removesuffix(".blocks") + ".weight" if name.endswith(".blocks") else name
        own[name] = nearest_blocks(weights[source]) if name.endswith(".blocks") else weights[source]
    made.load_state_dict(own)
    return made.eval()


def to_dense(model: Encoder) -> Encoder:
    """The same function with its quaternion matrices written out as real ones."""
    made = Encoder(EncoderConfig(**model.config.to_dict() | {"quaternion": False}))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".blocks")}
    for name in (n.removesuffix(".blocks") for n in model.state_dict() if n.endswith(".blocks")):
        weights[f"{name}.weight"] = model.get_submodule(name).weight.detach()
    made.load_state_dict(weights)
    return made.eval()


def nearest_blocks(weight: Tensor) -> Tensor:
    """Blocks [out, in/4] of the quaternion matrix nearest to a real one [out, in] in the least squares: signed means of its blocks."""
    out, in_features = weight.shape
    blocks = weight.reshape(4, out // 4, 4, in_features // 4)  # [c, o, a, i]
    return (torch.einsum("cab,coai->boi", HAMILTON.to(weight), blocks) / 4).reshape(out, in_features // 4)


def energy_kept(weight: Tensor, nearest: Tensor) -> float:
    """Share of the squared norm of ``weight`` that ``nearest`` has."""
    return float(nearest.square().sum() / weight.square().sum())
