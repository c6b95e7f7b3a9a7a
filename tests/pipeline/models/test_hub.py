"""Every family's checkpoint gives the logits that transformers gives; what cannot be read is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.hub import hub_config, load_encoder, save_encoder, save_for_transformers
from pipeline.tasks.heads import head_shape
from runtimes.errors import BadInput

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37, "num_hidden_layers": 3}
MOBILE = SMALL | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 3}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=37),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
    "albert": transformers.AlbertConfig(**SMALL | {"num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2),
    "mobilebert": transformers.MobileBertConfig(**MOBILE, classifier_activation=False),
    "mobilebert-pooler": transformers.MobileBertConfig(**MOBILE, classifier_activation=True),
    "mobilebert-layer-norm": transformers.MobileBertConfig(**MOBILE, normalization_type="layer_norm", layer_norm_eps=1e-5),
    "mobilebert-tiny": transformers.MobileBertConfig(**MOBILE, use_bottleneck_attention=True, key_query_shared_bottleneck=False),
    "mobilebert-no-bottleneck": transformers.MobileBertConfig(**MOBILE, use_bottleneck=False, trigram_input=False),
}


def random_model(config):
    torch.manual_seed(1)
    config.num_labels = 5
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_as_transformers(name, tmp_path):
    theirs = random_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path)
    ids = torch.randint(5, 99, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 5:] = 0
    ids[mask == 0] = CONFIGS[name].pad_token_id
    with torch.no_grad():
        difference = (theirs(ids, attention_mask=mask).logits - ours(ids, mask).logits).abs().max()
    assert difference < 1e-5
    assert count_unique_parameters(ours) <= sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_for_transformers_it_gives_the_same_logits_there(name, tmp_path):
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs")
    save_for_transformers(ours, tmp_path / "ours")
    read, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(5, 99, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 5:] = 0
    ids[mask == 0] = CONFIGS[name].pad_token_id
    with torch.no_grad():
        assert (read.eval()(ids, attention_mask=mask).logits - ours(ids, mask).logits).abs().max() < 1e-5
    assert {k: v.shape for k, v in read.state_dict().items()} == {k: v.shape for k, v in random_model(CONFIGS[name]).state_dict().items()}


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("bert", {"layers": [layer_shape(4, 8, [37]), layer_shape(3, 8, [37])]}, r"layers\[1\] is {'heads': 3"),
        ("bert", {"layers": [layer_shape(3, 8, [37])]}, r"layers\[0\] is"),
        ("bert", {"layers": [layer_shape(4, 8, [37, 37])]}, r"layers\[0\] is"),
        ("bert", {"embedding_size": 16, "embedding_projection": "word"}, "embedding_size is 16, would be read as 32; embedding_projection is 'word'"),
        ("bert", {"bottleneck_size": 16}, "bottleneck_size is 16"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size is 0"),
        ("bert", {"shared_with": [0, 0], "layers": [layer_shape(4, 8, [37])] * 2}, r"shared_with is \[0, 0\]"),
        ("distilbert", {"pooler": "relu"}, "type_vocab_size is 2"),
        ("mobilebert", {"embedding_projection_bias": False, "embedding_projection": "trigram", "embedding_size": 16}, "_bias is False"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(family, change, named, tmp_path):
    fields = {"vocab_size": 99, "hidden_size": 32, "layers": [layer_shape(4, 8, [37])], "family": family, "num_labels": 5}
    with pytest.raises(BadInput, match=f"transformers' {family} cannot express this encoder: .*{named}"):
        save_for_transformers(Encoder(EncoderConfig(**fields | change)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_published_mobilebert_has_its_exact_size(tmp_path):
    config = transformers.MobileBertConfig(classifier_activation=False, num_labels=2)
    with torch.device("meta"):
        from pipeline.models.hub_fields import config_fields

        model = Encoder(EncoderConfig(**config_fields(config.to_dict()), num_labels=2))
    encoder_only = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("heads"))
    assert encoder_only == 24_581_888


@pytest.mark.parametrize("name", ["bert", "albert", "mobilebert"])
def test_saved_and_loaded_again_is_the_same(name, tmp_path):
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "a")
    first = load_encoder(tmp_path / "a")
    save_encoder(first, tmp_path / "b")
    again = load_encoder(tmp_path / "b")
    ids = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        assert torch.equal(first(ids).logits, again(ids).logits)
    save_encoder(again, tmp_path / "c")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


def test_a_new_task_gets_a_new_classifier_and_keeps_the_encoder(tmp_path):
    random_model(CONFIGS["bert"]).save_pretrained(tmp_path)
    heads = [head_shape("classifier", ["logits"], "first", 3, pooler=True)]
    old, new = load_encoder(tmp_path), load_encoder(tmp_path, heads, ["yes", "no", "maybe"])
    assert new.heads["classifier"].weight.shape == (3, 32)
    assert new.fresh_heads == ["classifier"] and old.fresh_heads == []
    assert new.dropped_head == "classifier of BertForSequenceClassification"
    assert new.config.id2label == {0: "yes", 1: "no", 2: "maybe"}
    assert torch.equal(old.layers[0].attention.query.weight, new.layers[0].attention.query.weight)


def test_albert_layers_share_their_tensors(tmp_path):
    random_model(CONFIGS["albert"]).save_pretrained(tmp_path)
    model = load_encoder(tmp_path)
    assert len(model.layers) == 2
    assert model.config.shared_with == [0, 0, 2, 2]


@pytest.mark.parametrize("name", CONFIGS)
def test_hub_config_is_read_by_an_unmodified_auto_config(name, tmp_path):
    random_model(CONFIGS[name]).save_pretrained(tmp_path)
    config = hub_config(load_encoder(tmp_path).config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.num_labels == 5
    assert read.model_type == name.split("-")[0]


def test_refusals_name_what_is_wrong(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_encoder(tmp_path)
    random_model(CONFIGS["bert"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(BadInput, match="no weights"):
        load_encoder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(BadInput, match="only pickled weights"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="not a safetensors file"):
        load_encoder(tmp_path)
    (tmp_path / "aside").replace(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(BadInput, match=r"tensor layers\.0\.ffns\.0\.up\.\w+ has shape"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(BadInput, match=r"missing from the weights, first layers\.3"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(BadInput, match="'gpt2' is not a BERT-class encoder"):
        load_encoder(tmp_path)


TASKS = {
    "TokenClassification": [head_shape("classifier", ["logits"], "all", 5)],
    "QuestionAnswering": [head_shape("span", ["start_logits", "end_logits"], "all", 2)],
}
FAMILIES = [name for name in CONFIGS if "-" not in name]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_other_tasks_give_what_transformers_gives(name, task, tmp_path):
    torch.manual_seed(1)
    CONFIGS[name].num_labels = 2 if task == "QuestionAnswering" else 5
    theirs = getattr(transformers, f"AutoModelFor{task}").from_config(CONFIGS[name], attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs", TASKS[task])
    assert ours.dropped_head is None and ours.fresh_heads == []
    ids = torch.randint(5, 99, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 5:] = 0
    with torch.no_grad():
        wanted, found = theirs(ids, attention_mask=mask), ours(ids, mask).outputs
    for output in TASKS[task][0]["outputs"]:
        assert (wanted[output] - found[output]).abs().max() < 1e-5
    save_for_transformers(ours, tmp_path / "ours")
    again = getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        for output in TASKS[task][0]["outputs"]:
            assert (again(ids, attention_mask=mask)[output] - wanted[output]).abs().max() < 1e-5


def test_the_head_of_another_task_is_dropped_and_told(tmp_path):
    random_model(CONFIGS["bert"]).save_pretrained(tmp_path)
    model = load_encoder(tmp_path, TASKS["TokenClassification"])
    assert model.dropped_head == "classifier of BertForSequenceClassification"
    assert model.fresh_heads == ["classifier"]
    assert load_encoder(tmp_path, [head_shape("embedding", ["sentence_embedding"], "mean", None, normalized=True)]).fresh_heads == []


@pytest.mark.parametrize("tokens", ["mean", "first"])
def test_an_embedding_has_length_one_and_ignores_padding(tokens, tmp_path):
    random_model(CONFIGS["bert"]).save_pretrained(tmp_path)
    model = load_encoder(tmp_path, [head_shape("embedding", ["sentence_embedding"], tokens, None, normalized=True)])
    ids = torch.randint(5, 99, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    mask = (torch.arange(14) < 9).long()[None]
    with torch.no_grad():
        alone, behind = model(ids).outputs["sentence_embedding"], model(padded, mask).outputs["sentence_embedding"]
    assert alone.norm() == pytest.approx(1, abs=1e-6)
    assert (alone - behind).abs().max() < 1e-5
