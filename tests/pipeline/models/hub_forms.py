"""Tiny checkpoints in the forms that the hub has: what save_pretrained wrote, and what the scripts before it did."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.conftest import ROWS

ENGLISH = [text for texts in ROWS.values() for text in texts]
OTHERS = {
    "Chinese": ["请打开厨房的灯", "播放一些音乐", "把卧室的灯关掉"],
    "Arabic": ["شغل الضوء في المطبخ", "أطفئ المصباح من فضلك", "شغل بعض الموسيقى"],
    "Hindi": ["रसोई की बत्ती जलाओ", "कृपया दीपक बंद करो", "कुछ संगीत बजाओ"],
    "German": ["Schalte bitte das Licht in der Küche aus", "spiele schöne Musik", "die Straße ist naß"],
    "emoji": ["lights on 💡 please", "play 🎵🎶 now", "off 👍🏽 👨‍👩‍👧"],
}
WORDPIECE = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SENTENCE = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 20,
}  # fmt: skip


@cache
def corpus() -> tuple[str, ...]:
    return (*ENGLISH, *(text for texts in OTHERS.values() for text in texts))


@cache
def word_piece(lowercase: bool = True) -> str:
    """WordPiece with every character of the corpus, and unused numbers as BERT has them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "[unused0]"]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return tokenizer.to_str()


@cache
def byte_level() -> str:
    """Byte-level BPE with RoBERTa's special tokens: <s> is 0, padding 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, lstrip=token == "<mask>", normalized=False, special=True) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.post_processor = processors.RobertaProcessing(sep=("</s>", 2), cls=("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return tokenizer.to_str()


@cache
def unigram(begin: str = "<s>", end: str = "</s>", byte_fallback: bool = False) -> str:
    """SentencePiece unigram as XLM-R (or, with [CLS] and [SEP], ALBERT) has it."""
    special = [begin, "<pad>", end, "<unk>", "[MASK]" if begin == "[CLS]" else "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        corpus(), trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    if byte_fallback:
        state["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} {end} $B {end}", special_tokens=[(begin, 0), (end, 2)]
    )
    return tokenizer.to_str()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _vocab_txt(folder: Path, text: str) -> None:
    """All that google's BERT folders have."""
    vocabulary = json.loads(text)["model"]["vocab"]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.get)), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})


def _vocab_json(folder: Path, text: str) -> None:
    model = json.loads(text)["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _with_roles(roles: dict[str, str], as_objects: bool = False):
    def write(folder: Path, text: str) -> None:
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        tokens = {role: {"content": token, "lstrip": False, "__type": "AddedToken"} if as_objects else token for role, token in roles.items()}
        write_json(folder / ("special_tokens_map.json" if as_objects else "tokenizer_config.json"), tokens)

    return write


def _alone(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


FORMS: dict[str, tuple[str, Any, dict[str, Any], Any, str]] = {
    "bert, as google wrote it": ("BertForPreTraining", transformers.BertConfig, {}, _vocab_txt, "wordpiece"),
    "bert, cased, in shards": ("BertForMaskedLM", transformers.BertConfig, {}, _with_roles(WORDPIECE, True), "cased"),
    "bert, bare": ("BertModel", transformers.BertConfig, {}, _alone, "wordpiece"),
    "roberta, with vocab.json and merges.txt": ("RobertaForMaskedLM", transformers.RobertaConfig, {"type_vocab_size": 1}, _vocab_json, "bpe"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", transformers.XLMRobertaConfig, {"type_vocab_size": 1}, _with_roles(SENTENCE), "unigram"),
    "camembert, bare": ("CamembertModel", transformers.CamembertConfig, {"type_vocab_size": 1}, _alone, "unigram"),
    "distilbert": ("DistilBertForMaskedLM", transformers.DistilBertConfig, {}, _vocab_txt, "wordpiece"),
    "electra": ("ElectraForPreTraining", transformers.ElectraConfig, {"embedding_size": 16}, _with_roles(WORDPIECE), "wordpiece"),
    "albert": ("AlbertForPreTraining", transformers.AlbertConfig, {"embedding_size": 16}, _alone, "albert"),
    "mobilebert": (
        "MobileBertForPreTraining", transformers.MobileBertConfig,
        {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}, _vocab_txt, "wordpiece",
    ),
}  # fmt: skip
"""Name -> class of transformers, its config, what that has besides sizes, how the tokenizer is written, and which one it is."""
TOKENIZERS = {
    "wordpiece": word_piece, "cased": lambda: word_piece(False), "bpe": byte_level, "unigram": unigram,
    "albert": lambda: unigram("[CLS]", "[SEP]"),
}  # fmt: skip
"""Name -> text of its tokenizer.json."""


def write_form(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Write the checkpoint and give the model of transformers that it was made of."""
    class_name, config_class, more, write_tokenizer, kind = FORMS[name]
    text = TOKENIZERS[kind]()
    sizes = dict(SIZES)
    if name == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 20}
    torch.manual_seed(0)
    config = config_class(vocab_size=Tokenizer.from_str(text).get_vocab_size(), **sizes | more)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        config.pad_token_id = 1
    model = getattr(transformers, class_name)(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder, max_shard_size="20KB" if "shards" in name else "5GB")
    write_tokenizer(folder, text)
    if "google" in name:  # the scripts of 2018
        path = folder / "model.safetensors"
        tensors = load_file(path)
        old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for key, t in tensors.items()}
        assert old.keys() != tensors.keys()
        save_file(old, path, {"format": "pt"})
    return model
