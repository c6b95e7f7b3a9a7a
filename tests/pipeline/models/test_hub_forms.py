"""Checkpoints in the forms that the hub has are read as transformers reads them, and go through every stage; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.source import read_origin, source_sha256
from pipeline.tasks.heads import head_shape
from runtimes.bundle import open_bundle
from runtimes.errors import BadInput
from runtimes.verify import verify
from tests.pipeline.models.hub_forms import FORMS, TOKENIZERS, corpus, write_form
from tests.pipeline.small_tasks import run_task

EMBEDDING = [head_shape("embedding", ["sentence_embedding"], "first", None)]
LEFT_OUT = {
    "bert, as google wrote it": "cls of BertForPreTraining", "bert, cased, in shards": "cls of BertForMaskedLM",
    "roberta, with vocab.json and merges.txt": "lm_head of RobertaForMaskedLM", "xlm-roberta": "lm_head of XLMRobertaForMaskedLM",
    "distilbert": "vocab_layer_norm, vocab_projector, vocab_transform of DistilBertForMaskedLM",
    "electra": "discriminator_predictions of ElectraForPreTraining", "albert": "predictions, sop_classifier of AlbertForPreTraining",
    "mobilebert": "cls of MobileBertForPreTraining", "bert, bare": None, "camembert, bare": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Folder and transformers' model of each form, written once."""
    made = {}

    def get(name: str) -> tuple[Path, transformers.PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp("form")
            made[name] = folder, write_form(name, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_the_hub_is_read_as_transformers_reads_it(name, forms):
    folder, theirs = forms(name)
    ours = Checkpoint.load(folder, EMBEDDING)
    assert ours.model.dropped_head == LEFT_OUT[name]
    written = Tokenizer.from_str(TOKENIZERS[FORMS[name][4]]())
    texts = [*corpus()[::3], "Ünseen Word [MASK] <mask>", ""]
    for text in texts:
        assert ours.tokenizer.encode(text).ids == written.encode(text).ids
        assert ours.tokenizer.encode(text, "play").ids == written.encode(text, "play").ids
    begin, end = written.encode("").tokens
    for role, token in (("cls_token", begin), ("sep_token", end), ("pad_token", None), ("unk_token", None), ("mask_token", None)):
        assert ours.special_id(role) is not None, f"{role} is known though no file names it"
        assert token is None or ours.special_id(role) == written.token_to_id(token)
    ids = torch.tensor([written.encode(text).ids[:9] for text in ("turn on the light please now", "play some music in my kitchen")])[:, :8]
    with torch.no_grad():
        expected = theirs.base_model(ids).last_hidden_state[:, 0]
        assert (ours.model(ids).outputs["sentence_embedding"] - expected).abs().max() < 1e-5


STAGES = """
[[stage]]
use = "finetune"
epochs = 2
batch_size = 16
learning_rate = 1e-3
[[stage]]
use = "prune-vocab"
[[stage]]
use = "layerdrop"
layers = 1
drop_epochs = 1
heal = { epochs = 1, batch_size = 16 }
[[stage]]
use = "distill-mobilebert"
layers = 1
hidden_size = 16
bottleneck_size = 8
heads = 2
ffn_size = 16
embedding_size = 12
transfer = { epochs = 1, batch_size = 16 }
logits = { epochs = 1, batch_size = 16, texts = { copies = 1 } }
[[stage]]
use = "factorize-embeddings"
rank = 8
heal = { epochs = 1, batch_size = 16, texts = { copies = 1 } }
[[stage]]
use = "export"
buckets = [8, 16]
[[stage]]
use = "quantize"
metric_drop = 100
[[stage]]
use = "pack"
"""
REFUSED = {"albert": "layerdrop"}
"""Form -> the stage that cannot work on it, which the test leaves out then."""


@pytest.mark.parametrize("name", [name for name in FORMS if "bare" not in name])
def test_a_form_goes_from_finetune_to_a_verified_bundle(name, forms, tmp_path):
    folder, _ = forms(name)
    stages = STAGES
    if name in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name]):
            run_task("text-classification", STAGES, tmp_path, folder, tmp_path / "cache")
        stages = "[[stage]]\n".join(part for part in STAGES.split("[[stage]]\n") if REFUSED[name] not in part)
    ledger = run_task("text-classification", stages, tmp_path, folder, tmp_path / "cache")
    notes = {record["stage"]: record["notes"] for record in ledger.records}
    assert any(f"left out: {LEFT_OUT[name]}" in note for note in notes["finetune"])
    bundle = open_bundle(tmp_path / "out" / "bundle")
    verify(bundle.folder)
    assert {"revision", "license"} <= set(bundle.manifest["provenance"])
    kept = Tokenizer.from_file(str(bundle.tokenizer_file))
    kept.no_truncation()
    whole = Tokenizer.from_str(TOKENIZERS[FORMS[name][4]]())
    assert kept.get_vocab_size() < whole.get_vocab_size()
    text = "put the lights off in the kitchen"
    assert kept.encode(text).tokens == whole.encode(text).tokens


@pytest.mark.parametrize(
    "front", ["license: apache-2.0", 'license: "apache-2.0"', "license:\n- apache-2.0", "license: other\nlicense_name: apache-2.0"]
)
def test_revision_and_licence_are_read_where_the_hub_puts_them(front, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert read_origin(snapshot).revision == commit and read_origin(snapshot).license is None
    (snapshot / "README.md").write_text(f"---\nlanguage: en\n{front}\ntags:\n- bert\n---\n# A model\nlicense: mit\n")
    assert read_origin(snapshot).license == "apache-2.0"
    own = tmp_path / "own"
    (own / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (own / ".cache" / "huggingface" / "download" / "config.json.metadata").write_text(f"{commit}\netag\n1.0\n")
    (own / "README.md").write_bytes(b"\xff\xfe no front matter, license: mit")
    assert (read_origin(own).revision, read_origin(own).license) == (commit, None)


def test_the_key_of_a_model_in_shards_changes_with_each_of_them(forms, tmp_path):
    folder, _ = forms("bert, cased, in shards")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = source_sha256(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    assert source_sha256(tmp_path) != before
    shards[1].unlink()
    for read in (source_sha256, Checkpoint.load):
        with pytest.raises(BadInput, match=f"{shards[1].name} is missing, which model.safetensors.index.json names"):
            read(tmp_path)
