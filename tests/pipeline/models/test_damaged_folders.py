"""A damaged model folder is refused by one sentence that names the file and the cure, before memory is taken; never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.hub_fields import read_encoder_config
from pipeline.models.tokenizer_files import read_tokenizer
from runtimes.errors import BadInput
from tests.pipeline.models.hub_forms import word_piece, write_form, write_json

WHOLE = {
    "empty": b"", "spaces": b" \n", "braces": b"{}", "list": b"[1]", "null": b"null", "text": b'"bert"', "number": b"1e999",
    "not UTF-8": b"\xff\xfe{}", "deep": b"[" * 100_000, "long number": b'{"model_type": ' + b"9" * 5000 + b"}", "nonsense": b"<html>404</html>",
}  # fmt: skip
VALUES = [-1, 0, 1, 7, 1.5, 2**31, 10**30, 1e300, float("nan"), float("inf"), True, None, "x", "", [], [1], {}, {"0": 3}]
ONES = ("bert, as google wrote it", "roberta, with vocab.json and merges.txt", "albert", "mobilebert", "distilbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole")
            write_form(name, made[name])
        return made[name]

    return get


def refused(folder: Path, read) -> str | None:
    """What is said of the folder; None if it is read."""
    try:
        read(folder)
    except BadInput as error:
        assert str(folder) in str(error), f"names no file: {error}"
        assert "\n" not in str(error) and len(str(error)) < 1200, str(error)
        return str(error)
    return None


@pytest.mark.parametrize("damage", WHOLE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                                  "vocab.txt", "model.safetensors", "model.safetensors.index.json"])  # fmt: skip
def test_a_file_of_another_kind_is_refused(file, damage, folders, tmp_path):
    forms = {"vocab.txt": 0, "vocab.json": 1, "merges.txt": 1, "model.safetensors.index.json": -1}
    name = "bert, cased, in shards" if forms.get(file) == -1 else "albert" if file == "tokenizer.json" else ONES[forms.get(file, 0)]
    folder = shutil.copytree(folders(name), tmp_path / "model")
    (folder / file).write_bytes(WHOLE[damage])
    told = refused(folder, Checkpoint.load)
    if told is None:
        legal = {"special_tokens_map.json": ("braces",), "tokenizer_config.json": ("braces",), "merges.txt": ("empty", "spaces")}
        assert damage in legal.get(file, ()), "damage that is no damage"
    else:
        assert file in told


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_named(file, folders, tmp_path):
    folder = shutil.copytree(folders("xlm-roberta"), tmp_path / "model")
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    assert f"{file}: begins with a byte order mark; save it as UTF-8 without one" in refused(folder, Checkpoint.load)


@pytest.mark.parametrize("name", ["bert, as google wrote it", "roberta, with vocab.json and merges.txt", "xlm-roberta"])
def test_a_truncated_file_is_read_or_refused(name, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / "model")
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt")):
        whole = file.read_bytes()
        for share in (0.01, 0.3, 0.7, 0.99):
            file.write_bytes(whole[: int(len(whole) * share)])
            told = refused(folder, read_encoder_config if file.name == "config.json" else read_tokenizer)
            assert told is not None or file.suffix == ".txt", f"{file.name} cut to {share}"
        file.write_bytes(whole)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: not a safetensors file, or damaged" in refused(folder, Checkpoint.load)


@pytest.mark.parametrize("name", ONES)
def test_any_value_of_config_json_is_read_or_refused(name, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    cases = [(key, value) for key in raw for value in VALUES if value != raw[key]]
    passed = []
    for key, value in cases:
        write_json(folder / "config.json", raw | {key: value})
        if refused(folder, read_encoder_config) is None:
            passed.append((key, value))
    assert len(passed) < len(cases) - 50
    for key, value in passed:
        if key in ("vocab_size", "hidden_size", "dim", "num_hidden_layers", "n_layers", "type_vocab_size", "id2label", "architectures", "num_labels"):
            write_json(folder / "config.json", raw | {key: value})
            refused(folder, Checkpoint.load)
    for key in raw:
        write_json(folder / "config.json", {k: v for k, v in raw.items() if k != key})
        refused(folder, read_encoder_config)


@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert", "t5", "gpt2", None, ["bert"]])
def test_another_architecture_is_refused_with_the_list_of_those_that_can_be_read(kind, folders, tmp_path):
    write_json(tmp_path / "config.json", {"model_type": kind} if kind else {"hidden_size": 4})
    told = refused(tmp_path, read_encoder_config)
    assert "bert, roberta, xlm-roberta, camembert, distilbert, electra, albert, mobilebert" in told
    assert kind is None or repr(kind) in told


def test_a_tensor_that_an_encoder_does_not_have_is_named(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("bert, as google wrote it"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    adapter = "bert.encoder.layer.0.attention.self.query.lora_A.weight"
    save_file(tensors | {adapter: tensors["bert.pooler.dense.bias"].clone()}, folder / "model.safetensors")
    assert f"tensor {adapter} is none of a bert encoder; merge adapters" in refused(folder, Checkpoint.load)


TOKENIZER_DAMAGE = {
    "a word behind the table": (lambda state: state["model"]["vocab"].update({"behind": 999}), "resize_token_embeddings"),
    "no post-processor": (lambda state: state.update(post_processor=None), "TemplateProcessing"),
    "no unknown token": (lambda state: state["model"]["vocab"].pop("[UNK]"), "cannot encode a text|not a tokenizer file"),
    "no model": (lambda state: state.pop("model"), "not a tokenizer file"),
    "an empty vocabulary": (lambda state: (state["model"].update(vocab={}), state.update(added_tokens=[], post_processor=None)), "empty"),
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_a_tokenizer_that_does_not_fit_is_refused_with_the_cure(damage, folders, tmp_path):
    folder = shutil.copytree(folders("bert, bare"), tmp_path / "model")
    state = json.loads(word_piece())
    change, named = TOKENIZER_DAMAGE[damage]
    change(state)
    write_json(folder / "tokenizer.json", state)
    with pytest.raises(BadInput, match=named):
        Checkpoint.load(folder)


def test_special_tokens_of_another_tokenizer_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders("bert, bare"), tmp_path / "model")
    write_json(folder / "tokenizer_config.json", {"pad_token": "<pad>", "cls_token": "[CLS]"})
    assert "pad_token is '<pad>', which the vocabulary lacks" in refused(folder, Checkpoint.load)
    write_json(folder / "tokenizer_config.json", {"pad_token": ["[PAD]"]})
    assert "pad_token is" in refused(folder, Checkpoint.load)


def test_what_the_config_says_of_case_counts_as_in_transformers(tmp_path):
    (tmp_path / "tokenizer.json").write_text(word_piece())
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    text, _ = read_tokenizer(tmp_path)
    assert json.loads(text)["normalizer"]["lowercase"] is False
    assert theirs("Play ON")["input_ids"] == transformers.PreTrainedTokenizerFast(tokenizer_file=_written(tmp_path, text))("Play ON")["input_ids"]


def _written(folder: Path, text: str) -> str:
    path = folder / "ours.json"
    path.write_text(text)
    return str(path)


def test_a_sentencepiece_model_that_cannot_be_converted_is_refused_with_the_cure(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"no such model")
    write_json(tmp_path / "config.json", {"model_type": "albert"})
    with pytest.raises(BadInput, match=r"spiece\.model\) without tokenizer\.json.*save_pretrained"):
        read_tokenizer(tmp_path, "albert")


def test_a_folder_without_a_tokenizer_says_what_is_needed(tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer; tokenizer\.json is needed, or vocab\.txt, or vocab\.json with merges\.txt"):
        read_tokenizer(tmp_path)
