"""Factorized embeddings at full rank, and a pruned vocabulary on kept words, change nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.methods.distill.mobilebert import DistillMobilebert, make_student
from pipeline.methods.factorize.embeddings import factorize, truncated_svd
from pipeline.methods.prune.vocab import changed_tokens, kept_tokens, prune
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import count_unique_parameters
from pipeline.tasks.batches import make_batch
from pipeline.tasks.heads import head_shape
from pipeline.tasks.text_classification import TextClassification
from runtimes.errors import BadInput
from tests.conftest import ROWS
from tests.pipeline.labelled import encode

TRAIN = [text for texts in ROWS.values() for text in texts]

HEADS = [head_shape("classifier", ["logits"], "first", 3, pooler=True)]


@pytest.fixture(scope="module")
def checkpoint(tiny_model) -> Checkpoint:
    return Checkpoint.load(tiny_model, HEADS, ["on", "off", "music"])


def used(checkpoint) -> np.ndarray:
    """Tokens of the training texts."""
    return encode(checkpoint.tokenizer, TRAIN, [0] * len(TRAIN), 16, 0).ids


def logits(model, tokenizer, texts):
    batch = make_batch(encode(tokenizer, texts, [0] * len(texts), 16, model.config.pad_token_id), np.arange(len(texts)))
    with torch.no_grad():
        return model(batch.input_ids, batch.attention_mask).logits


def trigram_student(checkpoint):
    options = DistillMobilebert(layers=2, hidden_size=32, bottleneck_size=16, heads=2, ffn_size=32, embedding_size=16)
    return make_student(options, checkpoint.model, TextClassification(data="none", max_length=16)).eval()


@pytest.mark.parametrize("kind", ["bert", "trigram", "factorized already"])
def test_full_rank_factorization_is_the_identity(checkpoint, kind):
    model = checkpoint.model if kind == "bert" else trigram_student(checkpoint)
    if kind == "factorized already":
        model = factorize(checkpoint.model, 24)
    made = factorize(model, model.config.embedding_size)
    assert (logits(made, checkpoint.tokenizer, TRAIN) - logits(model, checkpoint.tokenizer, TRAIN)).abs().max() < 1e-5


def test_lower_rank_changes_logits_and_shrinks_the_table(checkpoint):
    model = trigram_student(checkpoint)
    made = factorize(model, 4)
    assert made.embeddings.word.weight.shape == (model.config.vocab_size, 4)
    assert made.embeddings.projection.weight.shape == (32, 12)
    assert count_unique_parameters(made) == count_unique_parameters(model) - 12 * model.config.vocab_size - 36 * 32
    assert (logits(made, checkpoint.tokenizer, TRAIN) - logits(model, checkpoint.tokenizer, TRAIN)).abs().max() > 1e-4


def test_truncated_svd_is_the_nearest_product():
    torch.manual_seed(0)
    matrix = torch.randn(30, 12)
    table, factor = truncated_svd(matrix, 5)
    lost = torch.linalg.svdvals(matrix)[5:].square().sum()
    assert torch.allclose((matrix - table @ factor).square().sum(), lost, rtol=1e-4)
    assert torch.allclose(table.norm(), factor.norm(), rtol=1e-4)


def test_padding_stays_zero_through_the_cut(checkpoint):
    assert factorize(trigram_student(checkpoint), 4).embeddings.word.weight[0].abs().max() < 1e-6


def test_rank_above_the_table_is_refused(checkpoint):
    with pytest.raises(BadInput, match="rank: 33 is above the table's 32"):
        factorize(checkpoint.model, 33)


def test_pruned_vocabulary_gives_equal_logits_on_kept_words(checkpoint):
    kept = kept_tokens(checkpoint, used(checkpoint), 1, 0)
    pruned = prune(checkpoint, kept)
    assert len(kept) < checkpoint.model.config.vocab_size
    assert not {"unseen", "[unused0]"} & set(pruned.tokenizer.get_vocab())
    for text in TRAIN:
        assert pruned.tokenizer.encode(text).tokens == checkpoint.tokenizer.encode(text).tokens
    assert torch.equal(logits(pruned.model, pruned.tokenizer, TRAIN), logits(checkpoint.model, checkpoint.tokenizer, TRAIN))


def test_an_unseen_word_still_becomes_known_pieces(checkpoint):
    pruned = prune(checkpoint, kept_tokens(checkpoint, used(checkpoint), 1, 0))
    assert checkpoint.tokenizer.encode("unseen").tokens == ["[CLS]", "unseen", "[SEP]"]
    tokens = pruned.tokenizer.encode("unseen").tokens
    assert tokens == ["[CLS]", "u", "##n", "##s", "##e", "##e", "##n", "[SEP]"]
    assert changed_tokens(checkpoint.tokenizer, pruned.tokenizer, ["unseen light", "light"]) == (1, 7, 1)


def test_special_tokens_keep_their_roles(checkpoint):
    pruned = prune(checkpoint, kept_tokens(checkpoint, used(checkpoint), 1, 0))
    encoding = pruned.tokenizer.encode("[MASK] light")
    assert encoding.tokens[:2] == ["[CLS]", "[MASK]"]
    assert encoding.ids[0] == pruned.special_id("cls_token")
    assert pruned.model.config.pad_token_id == pruned.special_id("pad_token")


def test_rare_pieces_go_and_frequent_ones_of_the_old_vocabulary_may_stay(checkpoint):
    def kept(*options) -> set[str]:
        return {checkpoint.tokenizer.id_to_token(number) for number in kept_tokens(checkpoint, used(checkpoint), *options)}

    assert "bedroom" in kept(1, 0)
    assert "bedroom" not in kept(10, 0)
    assert "unseen" in kept(1, 1000)
    assert "##z" in kept(1, 0)
    assert "##z" not in kept(1, 0, "used")


def test_a_tokenizer_without_pieces_cannot_be_pruned(checkpoint):
    state = json.loads(checkpoint.tokenizer_json)
    vocabulary = state["model"]["vocab"]
    state["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    other = Checkpoint(checkpoint.model, json.dumps(state), {})
    with pytest.raises(BadInput, match="the tokenizer is WordLevel, and only WordPiece, BPE, Unigram can be cut"):
        prune(other, [0])
