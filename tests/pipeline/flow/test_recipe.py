"""A recipe says what is wrong, and where, before any work is done."""

from __future__ import annotations

import tomllib

import pytest

from pipeline.flow.recipe import load_recipe, lock_text, presets, public_name
from runtimes.errors import BadInput

BASE = """
[model]
source = "m"
[task]
data = "d"
[[stage]]
use = "finetune"
"""


def files(*uses):
    """A recipe with these stages after the fine-tuning."""
    return BASE + "".join(f'[[stage]]\nuse = "{use}"\n' for use in uses)


def read(tmp_path, text, *overrides, **options):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return load_recipe(str(path), overrides, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("finetune", "fintune"), r"stage\[1\]\.use: unknown 'fintune'; did you mean 'finetune'"),
        (BASE + "epoch = 3\n", r"stage\[1\]\.finetune\.epoch: unknown key; did you mean 'epochs'"),
        (BASE + "epochs = -1\n", r"stage\[1\]\.finetune\.epochs: .*greater than 0"),
        (BASE + 'epochs = "many"\n', r"stage\[1\]\.finetune\.epochs: .*number"),
        (BASE + 'precision = "bf61"\n', r"stage\[1\]\.finetune\.precision: unknown 'bf61'; did you mean 'bf16'"),
        (BASE.replace("[task]", "[task]\nmax_lenght = 3"), r"task\.max_lenght: unknown key; did you mean 'max_length'"),
        (BASE.replace("[task]", "[tusk]"), r"(task: missing|tusk: unknown key; did you mean 'task')"),
        (BASE.replace('data = "d"', ""), r"task\.data: missing"),
        (BASE.split("[[stage]]")[0], r"at least one \[\[stage\]\]"),
        (BASE + "=", r"not TOML"),
        (BASE.replace('"d"', '"../d"'), r"task\.data: '\.\./d' leaves the folder.*--data"),
        (BASE.replace('"m"', '"/m"'), r"model\.source: '/m' leaves the folder.*--model"),
        ('name = "../x"' + BASE, r"name: '\.\./x'"),
        (BASE + '[[stage]]\nuse = "quantize"\n', r"stage\[2\]\.quantize: needs 'exported', which no earlier stage makes; put export before it"),
        (BASE + '[[stage]]\nuse = "export"\n[[stage]]\nuse = "factorize-embeddings"\n', r"changes the model after export has written its files"),
        ("[budget]\nlatency_ms = 1.0\n" + BASE, r"budget\.latency_ms: no stage measures latencies, .* add a stage bench"),
        ("[budget]\nrecall_drop = 2.0\n" + BASE.replace("[task]", "[task]\nmulti_label = true"), r"budget\.recall_drop: needs labelled rows"),
        ("[budget]\nrecall_drop = 2.0\n" + BASE.replace("[task]", '[task]\nkind = "text-regression"'), r"budget\.recall_drop: needs labelled rows"),
        ("[budget]\nrecall_drop = 2.0\n" + BASE.replace("[task]", "[task]\nrecalls = false"), r"task\.recalls: false, but budget\.recall_drop"),
        (files("export", "quantize", "quantize"), r"stage\[4\]\.quantize: quantize writes these files already, .* keep one of the two"),
        (files("export", "export"), r"stage\[3\]\.export: export writes these files already"),
        (files("export", "bench", "quantize"), r"stage\[4\]\.quantize: comes after bench, which would not see its files; put it before bench"),
        (files("export", "pack", "quantize"), r"stage\[4\]\.quantize: comes after pack"),
        (files("export", "quantize", "bench", "tune"), r"stage\[5\]\.tune: comes after bench"),
        (BASE + '[[stage]]\nuse = "distill-mobilebert"\nheads = 5\n', r"bottleneck_size 128 is not a multiple of heads 5"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        read(tmp_path, text)


def test_unknown_preset_gets_a_suggestion():
    with pytest.raises(BadInput, match="did you mean 'clinc150'"):
        load_recipe("clinc15")


def test_overrides_by_number_name_and_section(tmp_path):
    recipe = read(tmp_path, BASE, "stage.1.epochs=2", "finetune.batch_size=8", "task.max_length=32", "seed=7", "budget.size_mb=1.5")
    assert (recipe.stages[0].epochs, recipe.stages[0].batch_size, recipe.task.max_length, recipe.seed) == (2, 8, 32, 7)
    assert recipe.budget.size_mb == 1.5


@pytest.mark.parametrize("override", ["stage.9.epochs=2", "nonsense", "stage.fintune.epochs=1", "a.b.c.d=1", "task.data.more=1"])
def test_bad_overrides_are_refused(tmp_path, override):
    with pytest.raises(BadInput, match="--set"):
        read(tmp_path, BASE, override)


def test_a_key_of_a_nested_table_leaves_the_stage_its_other_defaults(tmp_path):
    text = BASE + '[[stage]]\nuse = "layerdrop"\nheal = { learning_rate = 1e-3 }\n'
    heal = read(tmp_path, text, "layerdrop.heal.batch_size=8", "stage.2.heal.texts.copies=2").stages[1].heal
    assert (heal.learning_rate, heal.batch_size, heal.texts.copies) == (1e-3, 8, 2)
    assert heal.epochs == 3, "the stage's own default, not that of every healing"
    deep = read(tmp_path, BASE + '[[stage]]\nuse = "layerdrop"\nheal = { texts = { unlabeled = false } }\n').stages[1].heal
    assert (deep.texts.unlabeled, deep.texts.copies, deep.epochs) == (False, 0, 3)


def test_a_misspelt_key_of_a_nested_table_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"stage\[2\]\.layerdrop\.heal\.epoch: unknown key; did you mean 'epochs'"):
        read(tmp_path, BASE + '[[stage]]\nuse = "layerdrop"\nheal = { epoch = 1 }\n')


def test_the_command_line_may_point_anywhere(tmp_path):
    recipe = read(tmp_path, BASE, model="/abs/model", data="../data")
    assert (recipe.model.source, recipe.task.data) == ("/abs/model", "../data")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("my/data", "my/data"), ("builtin:commands", "builtin:commands"),
        ("/home/ann/models/intents", "intents"), ("/home/ann/models/intents/", "intents"), ("../ann/intents", "intents"),
        ("C:\\Users\\Ann\\intents", "intents"), ("~/models/intents", "~/models/intents"),
    ],
)  # fmt: skip
def test_of_paths_on_this_machine_the_last_part_is_shown(name, shown):
    assert public_name(name) == shown


def test_the_lock_names_no_folder_of_this_machine(tmp_path):
    recipe = read(tmp_path, files("export", "bench"), 'bench.on=["local", "@/home/ann/lab.toml"]', model="/home/ann/model", data="/home/ann/data.csv")
    lock = lock_text(recipe)
    assert "ann" not in lock
    assert tomllib.loads(lock)["stage"][2]["on"] == ["local", "@lab.toml"]
    assert (recipe.model.source, recipe.task.data) == ("/home/ann/model", "/home/ann/data.csv"), "the run itself needs the paths"


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_their_lock_reads_back_as_the_same_recipe(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(lock_text(recipe))
    again = load_recipe(str(path))
    assert lock_text(again) == lock_text(recipe)
    stage = tomllib.loads(lock_text(recipe))["stage"][0]
    assert stage["use"] in ("finetune", "adopt")
    assert stage["use"] == "adopt" or "weight_decay" in stage, "defaults are written out"
