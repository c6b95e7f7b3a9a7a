"""Read the tokenizer of a model folder as the hub has it, and write it as every client reads it.

Three forms are read: ``tokenizer.json``; ``vocab.txt`` of a WordPiece tokenizer; ``vocab.json`` with ``merges.txt`` of a byte-level BPE.
A SentencePiece model alone is converted by transformers where the package sentencepiece is installed.

Special tokens are named in ``tokenizer_config.json`` or ``special_tokens_map.json``, as texts or as objects; what neither names is what the
family calls it, if the vocabulary has such a token. Many published folders name none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipeline.models.json_files import CURE, read_table, read_text
from runtimes.errors import BadInput

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
SPECIAL_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
_WORDPIECE = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA = {
    "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "bos_token": "<s>",
    "eos_token": "</s>",
}  # fmt: skip
_ALBERT = _WORDPIECE | {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "[CLS]", "eos_token": "[SEP]"}
FAMILY_TOKENS = {
    "bert": _WORDPIECE, "distilbert": _WORDPIECE, "electra": _WORDPIECE, "mobilebert": _WORDPIECE, "albert": _ALBERT,
    "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA,
}  # fmt: skip
"""``model_type`` -> what transformers' tokenizer of that family calls its special tokens."""
PROBES = ("", "a", "Ab c, 1!", "\u4e2d\u6587 \u0928\u092e \u0645\u0631\u062d\u0628\u0627 \U0001f600")


def read_tokenizer(folder: Path, family: str = "bert") -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` as text, and ``tokenizer_config.json`` with the special tokens by role, each as a text.

    Args:
        family: ``model_type`` of the model beside it.

    Raises:
        BadInput: there is none, a file of it is damaged, or it makes inputs that no model of these families can read.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_table(folder / name)
    names = FAMILY_TOKENS.get(family, _WORDPIECE)
    if (folder / TOKENIZER).is_file():
        place = folder / TOKENIZER
        text = read_text(place)
        read_table(place)
        tokenizer = _opened(text, place)
        wanted = _with_settings(text, config)
        if wanted != text:
            text, tokenizer = wanted, _opened(wanted, place)
    else:
        place, tokenizer = _made(folder, config, names)
        text = tokenizer.to_str()
    _check(tokenizer, place)
    roles = _roles(tokenizer, config, names, folder)
    config = {key: value for key, value in config.items() if key not in SPECIAL_ROLES} | roles
    if "tokenizer_class" not in config and json.loads(text)["model"]["type"] != "WordPiece":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # whatever the family of a compressed model suggests
    return text, config


def write_tokenizer(folder: Path, tokenizer_json: str, config: dict[str, Any], max_length: int) -> None:
    """Write the four files that tokenizers, transformers and transformers.js read, the same bytes every time."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    special = {role: config[role] for role in SPECIAL_ROLES if config.get(role) is not None}
    keep = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "tokenizer_class")
    settings = special | {k: config[k] for k in keep if k in config} | {"model_max_length": max_length}
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "WordPiece":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        (folder / "vocab.txt").write_text("".join(piece + "\n" for piece in pieces), encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# --- what is wrong with a tokenizer ------------------------------------------------------------------------------------


def _opened(text: str, place: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and its panics are none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise BadInput(f"model {place}: not a tokenizer file: {_first_line(error)}; {CURE}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def _check(tokenizer: Tokenizer, place: Path) -> None:
    """Refuse a tokenizer that cannot encode any text, or makes nothing of an empty one."""
    if not tokenizer.get_vocab_size():
        raise BadInput(f"model {place}: the vocabulary is empty; {CURE}")
    try:
        encodings = [tokenizer.encode(text) for text in PROBES]
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise BadInput(f"model {place}: cannot encode a text: {_first_line(error)}; {CURE}") from error
    if not encodings[0].ids:
        raise BadInput(
            f"model {place}: adds no special tokens around a text (it has no post-processor), and a BERT's heads read the first one; set "
            "tokenizer.post_processor to a TemplateProcessing such as '[CLS] $A [SEP]' and save it again"
        )


def _roles(tokenizer: Tokenizer, config: dict[str, Any], names: dict[str, str], folder: Path) -> dict[str, str]:
    """Special tokens by role; those of the family where the files name none."""
    vocabulary, roles = tokenizer.get_vocab(), {}
    for role in SPECIAL_ROLES:
        given = config.get(role)
        content = given.get("content") if isinstance(given, dict) else given
        if given is not None and not isinstance(content, str):
            raise BadInput(f"model {folder / 'tokenizer_config.json'}: {role} is {str(given)[:60]!r}, not a token; {CURE}")
        content = names.get(role) if content is None else content
        if content in vocabulary:
            roles[role] = content
        elif given is not None and role in ("pad_token", "unk_token", "cls_token", "sep_token"):
            raise BadInput(
                f"model {folder}: {role} is {content!r}, which the vocabulary lacks; the tokenizer's files do not belong together, {CURE}"
            )
    return roles


# --- tokenizers of before tokenizer.json -------------------------------------------------------------------------------


def _made(folder: Path, config: dict[str, Any], names: dict[str, str]) -> tuple[Path, Tokenizer]:
    """The tokenizer that the old files of a folder describe, and the file that it was made of."""
    if (folder / "vocab.txt").is_file():
        return folder / "vocab.txt", _word_piece(folder / "vocab.txt", config, names)
    if (folder / "vocab.json").is_file():
        return folder / "vocab.json", _byte_level(folder, config, names)
    pieces = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if pieces is None:
        raise BadInput(f"model {folder}: no tokenizer; {TOKENIZER} is needed, or vocab.txt, or vocab.json with merges.txt")
    try:
        from transformers import AutoTokenizer

        return pieces, AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True).backend_tokenizer
    except Exception as error:  # of a library that is missing, or of whatever a damaged file makes the converter stumble over
        raise BadInput(
            f"model {folder}: the tokenizer is a SentencePiece model ({pieces.name}) without {TOKENIZER}, and transformers cannot convert it "
            f"here ({_first_line(error)}). Where sentencepiece is installed: "
            f"AutoTokenizer.from_pretrained({folder.name!r}).save_pretrained({folder.name!r})"
        ) from error


def _word_piece(path: Path, config: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """As transformers' BertTokenizerFast makes it; lower case unless the config says otherwise."""
    lines = read_text(path).split("\n")
    pieces = [line.rstrip("\r") for line in (lines[:-1] if not lines[-1] else lines)]
    if not any(pieces):
        raise BadInput(f"model {path}: empty; {CURE}")
    ids = {piece: number for number, piece in enumerate(pieces)}
    special = {role: _content(config, role, names) for role in names}
    missing = [special[role] for role in ("unk_token", "cls_token", "sep_token") if special[role] not in ids]
    if missing:
        raise BadInput(f"model {path}: the vocabulary lacks {missing[0]}, which the tokenizer needs; {CURE}")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=special["unk_token"], max_input_chars_per_word=100))
    lower = config.get("do_lower_case", True) is not False
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True) is not False, lowercase=lower, strip_accents=config.get("strip_accents")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    begin, end = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0", pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1", special_tokens=[(begin, ids[begin]), (end, ids[end])]
    )
    tokenizer.add_special_tokens([token for token in dict.fromkeys(special.values()) if token in ids])
    return tokenizer


def _byte_level(folder: Path, config: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """As transformers' RobertaTokenizerFast makes it."""
    vocabulary = read_table(folder / "vocab.json")
    if not (folder / "merges.txt").is_file():
        raise BadInput(f"model {folder}: vocab.json without merges.txt; both are needed, or {TOKENIZER}")
    if not all(type(number) is int and 0 <= number < 2**31 for number in vocabulary.values()):
        raise BadInput(f"model {folder / 'vocab.json'}: not a table of tokens and their numbers; {CURE}")
    merges = _merges(folder / "merges.txt", vocabulary)
    special = {role: _content(config, role, names) for role in names}
    missing = [special[role] for role in ("unk_token", "cls_token", "sep_token") if special[role] not in vocabulary]
    if missing:
        raise BadInput(f"model {folder / 'vocab.json'}: the vocabulary lacks {missing[0]}, which the tokenizer needs; {CURE}")
    prefix_space = config.get("add_prefix_space") is True
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = ((token, vocabulary[token]) for token in (special["cls_token"], special["sep_token"]))
    tokenizer.post_processor = processors.RobertaProcessing(sep=end, cls=begin, trim_offsets=True, add_prefix_space=prefix_space)
    tokens = [token for token in dict.fromkeys(special.values()) if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(token, lstrip=token == special["mask_token"], special=True, normalized=False) for token in tokens])
    return tokenizer


def _merges(path: Path, vocabulary: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that BPE joins, first the most frequent."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise BadInput(f"model {path}: line {number} is {line[:40]!r}, not two tokens that make a third one of vocab.json; {CURE}")
        pairs.append(pair)
    return pairs


def _content(config: dict[str, Any], role: str, names: dict[str, str]) -> str:
    given = config.get(role)
    content = given.get("content") if isinstance(given, dict) else given
    return content if isinstance(content, str) else names[role]


def _with_settings(text: str, config: dict[str, Any]) -> str:
    """``tokenizer.json`` with what ``tokenizer_config.json`` says of case and accents, which transformers believes more."""
    state = json.loads(text)
    normalizer = state.get("normalizer")
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return text
    named = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
    said = {ours: config[theirs] for theirs, ours in named.items() if type(config.get(theirs)) is bool}
    if all(normalizer.get(key) == value for key, value in said.items()):
        return text
    return json.dumps(state | {"normalizer": normalizer | said}, ensure_ascii=False)
