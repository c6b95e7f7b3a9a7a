"""What the tests share: a tiny random BERT made on the spot, a tiny task, and a run of the real thing on a slice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

for name, value in {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

WORDS = "turn switch put on off the light lights lamp music song play stop now please kitchen bedroom in my some".split()
ROWS = {
    "on": ["turn on the light", "switch the lamp on", "put the lights on in the kitchen", "lights on please", "turn the bedroom lamp on now"],
    "off": ["turn off the light", "switch the lamp off", "put the lights off in the kitchen", "lights off please", "turn the bedroom lamp off now"],
    "music": ["play some music", "play the song", "music please", "play my song in the bedroom", "put some music on"],
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a 2-layer BERT with random weights and a WordPiece tokenizer of a hundred pieces."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "[unused0]", *letters, *(f"##{c}" for c in letters), *WORDS, "unseen", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Data folder with three classes; every text occurs several times so that a tiny model can learn it."""
    folder = tmp_path_factory.mktemp("tiny_data")
    for split, copies in (("train", 8), ("validation", 1), ("test", 1)):
        rows = [{"text": text, "label": label} for _ in range(copies) for label, texts in ROWS.items() for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RECIPE_HEAD = """
[model]
source = "unset"
[task]
data = "unset"
max_length = 16
"""
"""What stands before the stages of a recipe whose model and data are named on the command line; further keys of the task may follow."""

TINY_RECIPE = f"""
name = "tiny"
{RECIPE_HEAD}
[[stage]]
use = "finetune"
epochs = 20
batch_size = 8
learning_rate = 3e-3
[[stage]]
use = "prune-vocab"
[[stage]]
use = "distill-mobilebert"
layers = 2
hidden_size = 32
bottleneck_size = 16
heads = 2
ffn_size = 32
embedding_size = 16
transfer = {{ epochs = 8, batch_size = 8, learning_rate = 3e-3 }}
logits = {{ epochs = 20, batch_size = 8, learning_rate = 3e-3, texts = {{ copies = 1 }} }}
[[stage]]
use = "factorize-embeddings"
rank = 8
heal = {{ epochs = 1, batch_size = 8, texts = {{ copies = 1 }} }}
[[stage]]
use = "export"
buckets = [8, 16]
[[stage]]
use = "quantize"
[[stage]]
use = "bench"
texts = 5
rounds = 2
min_seconds = 0.05
lengths = [8]
[[stage]]
use = "pack"
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_recipe, tiny_model, tiny_data) -> Path:
    """Output folder of a whole run of the tiny recipe; its cache is ``cache`` beside it."""
    from pipeline.flow.cache import Cache
    from pipeline.flow.engine import run
    from pipeline.flow.progress import Progress
    from pipeline.flow.recipe import load_recipe
    from pipeline.reports.run_report import write_report

    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(str(tiny_recipe), model=str(tiny_model), data=str(tiny_data))
    run(recipe, folder / "out", Cache(folder / "cache"), Progress(quiet=True), write_report)
    return folder / "out"
