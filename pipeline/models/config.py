"""What an encoder looks like: one configuration class for every BERT-class architecture.

BERT, RoBERTa, DistilBERT, MiniLM, ELECTRA, ALBERT, MobileBERT and everything a structural method makes of them
are points in the space this class spans. Layers are described one by one (:class:`LayerShape`), because pruning
leaves them unequal; what all layers share is said once.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pipeline.tasks.heads import HEAD_TOKENS, head_shape

NORMS = ("layer_norm", "no_norm")
EMBEDDING_PROJECTIONS = ("none", "word", "trigram", "sum")
BOTTLENECK_ATTENTION = ("query_key", "all", "none")
LAYER_PARTS = ("heads", "head_size", "ffn_sizes", "ranks")


class EncoderConfig(PretrainedConfig):
    """Shape of an encoder and of its heads.

    Args:
        vocab_size: rows of the word table.
        hidden_size: H, width of the feature map that flows between layers.
        embedding_size: E, width of the word table. Equal to H unless ``embedding_projection`` maps E to H.
        embedding_projection: how E becomes H.
            ``none``: E = H. ``word``: the word embedding alone is mapped, then position and type are added
            (factorized BERT). ``trigram``: the embeddings of the next, this and the previous token are joined and
            mapped from 3E (MobileBERT, arXiv:2004.02984). ``sum``: word + position + type live and are normalised
            in E, the result is mapped (ALBERT, ELECTRA).
        embedding_projection_bias: whether that map has a bias.
        layers: one mapping per layer with ``heads``, ``head_size``, ``ffn_sizes`` (one width per stacked FFN) and, where matrices are
            products of two thin ones, ``ranks``: name within the layer (``attention.query``, ``ffns.0.up``) -> rank. A layer may
            have no heads, or FFNs of width 0: what is left of them is the bias behind them.
        shared_with: for each layer the index of the layer whose weights it uses (itself when it has its own).
        shared_attention, shared_ffn: the same for the matrices of the attention, or of the FFNs, alone; norms stay apart.
        quaternion: the matrices of the layers are quaternion matrices with a quarter of the weights (arXiv:1906.04393).
        bottleneck_size: B, width inside a layer (MobileBERT); None for a layer that works in H throughout.
        bottleneck_attention: which attention inputs are read from the bottleneck: ``query_key`` (MobileBERT),
            ``all`` (MobileBERT-tiny) or ``none``.
        norm: ``layer_norm`` or ``no_norm`` (an affine map without statistics).
        activation: name of the FFN activation as transformers spells it.
        pooler: activation of the dense layer between [CLS] and the heads that ask for it, or ``none`` for no such layer.
        heads: what reads the last feature map, each as :func:`head_shape` makes it; a classifier of the first token if left out.
        position_offset: first row of the position table in use (RoBERTa: padding index + 1).
        type_vocab_size: rows of the token-type table; 0 for none (DistilBERT).
        family: the transformers ``model_type`` whose shape this is, for saving in that library's form.
    """

    model_type = "pocketbert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 384,
        embedding_size: int | None = None,
        embedding_projection: str = "none",
        embedding_projection_bias: bool = True,
        layers: list[dict[str, Any]] | None = None,
        shared_with: list[int] | None = None,
        shared_attention: list[int] | None = None,
        shared_ffn: list[int] | None = None,
        quaternion: bool = False,
        bottleneck_size: int | None = None,
        bottleneck_attention: str = "query_key",
        norm: str = "layer_norm",
        layer_norm_eps: float = 1e-12,
        activation: str = "gelu",
        pooler: str = "tanh",
        heads: list[dict[str, Any]] | None = None,
        max_position_embeddings: int = 512,
        position_offset: int = 0,
        type_vocab_size: int = 2,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        classifier_dropout: float = 0.1,
        initializer_range: float = 0.02,
        pad_token_id: int = 0,
        family: str = "bert",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.embedding_projection = embedding_projection
        self.embedding_projection_bias = embedding_projection_bias
        self.layers = layers if layers is not None else [layer_shape(12, 32, [1536]) for _ in range(6)]
        own = list(range(len(self.layers)))
        self.shared_with = own if shared_with is None else shared_with
        self.shared_attention = own if shared_attention is None else shared_attention
        self.shared_ffn = own if shared_ffn is None else shared_ffn
        self.quaternion = quaternion
        self.bottleneck_size = bottleneck_size
        self.bottleneck_attention = bottleneck_attention
        self.norm = norm
        self.layer_norm_eps = layer_norm_eps
        self.activation = activation
        self.pooler = pooler
        self.max_position_embeddings = max_position_embeddings
        self.position_offset = position_offset
        self.type_vocab_size = type_vocab_size
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.family = family
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.heads = [head_shape("classifier", ["logits"], "first", self.num_labels, pooler=True)] if heads is None else heads
        self._check()

    def _check(self) -> None:
        """Raise ValueError where two fields contradict each other."""
        if self.norm not in NORMS:
            raise ValueError(f"norm: unknown {self.norm!r}; known are {', '.join(NORMS)}")
        if self.embedding_projection not in EMBEDDING_PROJECTIONS:
            raise ValueError(
                f"embedding_projection: unknown {self.embedding_projection!r}; known are {', '.join(EMBEDDING_PROJECTIONS)}"
            )
        if self.bottleneck_attention not in BOTTLENECK_ATTENTION:
            raise ValueError(
                f"bottleneck_attention: unknown {self.bottleneck_attention!r}; known are {', '.join(BOTTLENECK_ATTENTION)}"
            )
        for head in self.heads:
            if head["tokens"] not in HEAD_TOKENS:
                raise ValueError(f"heads: tokens is {head['tokens']!r}; known are {', '.join(HEAD_TOKENS)}")
        if self.embedding_projection == "none" and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size {self.embedding_size} differs from hidden_size {self.hidden_size}: "
                "an embedding_projection must map one to the other"
            )
        parts = {"shared_with": tuple(LAYER_PARTS), "shared_attention": ("heads", "head_size"), "shared_ffn": ("ffn_sizes",)}
        for name, alike in parts.items():
            self._check_sharing(name, getattr(self, name), alike)
        apart = list(range(len(self.layers)))
        if self.shared_with != apart and (self.shared_attention != apart or self.shared_ffn != apart):
            raise ValueError("shared_with shares whole layers; shared_attention and shared_ffn cannot share their parts beside it")
        if self.quaternion and any(shape.get("ranks") for shape in self.layers):
            raise ValueError("quaternion: a matrix cannot be a product of thin ones too; leave ranks out")

    def _check_sharing(self, name: str, owners: list[int], alike: tuple[str, ...]) -> None:
        """``alike``: what two layers must have in common to share."""
        if len(owners) != len(self.layers):
            raise ValueError(f"{name} names {len(owners)} layers, there are {len(self.layers)}")
        for index, owner in enumerate(owners):
            if not 0 <= owner <= index or owners[owner] != owner:
                raise ValueError(f"{name}[{index}] = {owner}: must name an earlier layer that owns its weights")
            if any(self.layers[index].get(key) != self.layers[owner].get(key) for key in alike):
                raise ValueError(f"layer {index} shares the weights of layer {owner} but has another shape")

    @property
    def shares(self) -> bool:
        """Whether two layers use the same weights."""
        apart = list(range(len(self.layers)))
        return any(owners != apart for owners in (self.shared_with, self.shared_attention, self.shared_ffn))

    @property
    def hidden_can_shrink(self) -> bool:
        """Whether single channels of the feature map can be left out: layer norms all along, no bottlenecks, embeddings as wide as the layers,
        and no head that gives the feature map itself away."""
        plain = self.bottleneck_size is None and self.norm == "layer_norm" and self.embedding_projection in ("none", "word")
        return plain and all(head["size"] is not None for head in self.heads)

    @property
    def reads_first_only(self) -> bool:
        """Whether all heads read the first token alone."""
        return all(head["tokens"] == "first" for head in self.heads)

    @property
    def per_token_outputs(self) -> frozenset[str]:
        """Names of the outputs that every token has."""
        return frozenset(name for head in self.heads if head["tokens"] == "all" for name in head["outputs"])

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def num_attention_heads(self) -> int:
        """Heads of the first layer; layers may differ after pruning."""
        return self.layers[0]["heads"] if self.layers else 0

    @property
    def inner_size(self) -> int:
        """Width inside a layer: the bottleneck where there is one, else the hidden size."""
        return self.hidden_size if self.bottleneck_size is None else self.bottleneck_size


def layer_shape(heads: int, head_size: int, ffn_sizes: list[int], ranks: dict[str, int] | None = None) -> dict[str, Any]:
    """Shape of one layer, as it stands in :attr:`EncoderConfig.layers`."""
    shape = {"heads": heads, "head_size": head_size, "ffn_sizes": list(ffn_sizes)}
    return shape | {"ranks": dict(ranks)} if ranks else shape
