"""Recipes, ``--set`` and paths that cannot be meant: exit code 2, a short message with place and cure, nothing written, no traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app

MODEL, TASK, FINETUNE = '[model]\nsource = "m"\n', '[task]\ndata = "d"\n', '[[stage]]\nuse = "finetune"\n'
BASE = MODEL + TASK + FINETUNE
FILES = BASE + "".join(f'[[stage]]\nuse = "{use}"\n' for use in ("export", "quantize", "bench", "pack"))
DIGITS, LONG, DEEP = "9" * 5000, "m" * 5000, "[" * 3000 + "]" * 3000


def stage(use: str, key: str) -> str:
    """A recipe of all file stages in which the stage ``use``, added where it is not one of them, has ``key``."""
    return FILES.replace(f'"{use}"\n', f'"{use}"\n{key}\n') if f'"{use}"' in FILES else BASE + f'[[stage]]\nuse = "{use}"\n{key}\n'


RECIPES = {
    "seed of -1": ("seed = -1\n" + BASE, r"seed: .*greater than or equal to 0 \(got -1\)"),
    "seed of 2^64": (f"seed = {2**64}\n" + BASE, r"seed: .*less than 4294967296"),
    "seed of 5,000 digits": (f"seed = {DIGITS}\n" + BASE, "r.toml: a number has too many digits"),
    "seed of 20,000 bits": (f"seed = 0x{'f' * 5000}\n" + BASE, r"seed: .*\(got a number of 20000 bits\)"),
    "epochs inf": (stage("finetune", "epochs = inf"), r"stage\[1\]\.finetune\.epochs: .*(finite|less than)"),
    "epochs nan": (stage("finetune", "epochs = nan"), r"stage\[1\]\.finetune\.epochs: .*(finite|greater than)"),
    "epochs 1e300": (stage("finetune", "epochs = 1e300"), r"finetune\.epochs: .*less than or equal to 10000"),
    "epochs 1e-9": (stage("finetune", "epochs = 1e-9"), r"finetune\.epochs: fewer than 0\.001 passes"),
    "epochs of a nested table": (stage("layerdrop", "heal = { epochs = inf }"), r"layerdrop\.heal\.epochs"),
    "gate_epochs 1e300": (stage("prune-gates", "gate_epochs = 1e300"), r"prune-gates\.gate_epochs: .*less than or equal to 10000"),
    "batch_size 1e11": (stage("finetune", "batch_size = 100_000_000_000"), r"finetune\.batch_size: .*less than or equal to 65536"),
    "batch_size 0": (stage("finetune", "batch_size = 0"), r"finetune\.batch_size: .*greater than or equal to 1"),
    "learning_rate inf": (stage("finetune", "learning_rate = inf"), r"finetune\.learning_rate"),
    "weight_decay inf": (stage("finetune", "weight_decay = inf"), r"finetune\.weight_decay: .*finite"),
    "temperature inf": (stage("layerdrop", "heal = { temperature = inf }"), r"heal\.temperature: .*finite"),
    "budget inf": ("[budget]\nsize_mb = inf\n" + BASE, r"budget\.size_mb: .*finite"),
    "budget nan": ("[budget]\nmetric_drop = nan\n" + BASE, r"budget\.metric_drop"),
    "rounds of years": (stage("bench", "rounds = 1_000_000_000"), r"bench\.rounds: .*less than or equal to 1000"),
    "min_seconds of years": (stage("bench", "min_seconds = inf"), r"bench\.min_seconds"),
    "length 0": (stage("bench", "lengths = [0]"), r"bench\.lengths\.0: .*greater than or equal to 2"),
    "model a text": ('model = "bert"\n' + TASK + FINETUNE, r"model: a \[model\] table is needed, got 'bert'"),
    "model a list": ('model = ["bert"]\n' + TASK + FINETUNE, r"model: a \[model\] table is needed"),
    "task a text": ('task = "intents"\n' + MODEL + FINETUNE, r"task: a \[task\] table is needed"),
    "task a list of tables": (MODEL + TASK.replace("[task]", "[[task]]") + FINETUNE, r"task: a \[task\] table is needed"),
    "budget a list": ("budget = [1]\n" + BASE, r"budget: a \[budget\] table is needed"),
    "stage a number": ("stage = 3\n" + MODEL + TASK, r"at least one \[\[stage\]\] table"),
    "stage a list of texts": ('stage = ["finetune"]\n' + MODEL + TASK, r"at least one \[\[stage\]\] table"),
    "use a list": (BASE.replace('"finetune"', '["finetune"]'), r"stage\[1\]\.use: unknown \['finetune'\]"),
    "use a table": (BASE.replace('"finetune"', "{ a = 1 }"), r"stage\[1\]\.use: unknown"),
    "kind a list": (BASE.replace("[task]", '[task]\nkind = ["a"]'), r"task\.kind: unknown \['a'\]"),
    "block of 0": (stage("prune-magnitude", "block = [0, 4]"), r"prune-magnitude\.block\.0: .*greater than 0"),
    "reads a number": (stage("finetune", "reads = { model = 3 }"), r"finetune\.reads\.model"),
    "a date": (stage("finetune", "epochs = 1979-05-27"), r"finetune\.epochs: .*number"),
    "deep lists": (f"x = {DEEP}\n" + BASE, "r.toml: lists or tables are nested too deep"),
    "lists of 90 levels": (stage("finetune", "epochs = " + "[" * 90 + "]" * 90), r"finetune\.epochs: .*number.*\(180 characters\)"),
    "name of 5,000 characters": (f'name = "{LONG}"\n' + BASE, r"name: .*\(5002 characters\) must be .*at most 100"),
    "name a list": ("name = [1]\n" + BASE, r"name: \[1\] must be"),
    "key of 5,000 characters": (stage("finetune", f"{LONG} = 1"), r"stage\[1\]\.finetune\.m+: unknown key"),
    "source of 5,000 characters": (BASE.replace('"m"', f'"{LONG}"'), r"model\.source: .*too long for a path"),
    "data of 5,000 characters": (BASE.replace('"d"', f'"{LONG}"'), r"task\.data: .*too long for a path"),
    "source with NUL": (BASE.replace('"m"', r'"a\u0000b"'), r"model\.source: 'a\\x00b' has a NUL character"),
    "rule without its bracket": (stage("quantize", 'rules = [["(", "int8"]]'), r"quantize\.rules: '\(' is not a regular expression: missing \)"),
    "rule that repeats too often": (stage("quantize", 'rules = [["a{99999999999}", "int8"]]'), r"quantize\.rules: .* is not a regular expression"),
    "rule nested too deep": (stage("quantize", f'rules = [["{"(" * 3000}{")" * 3000}", "int8"]]'), r"quantize\.rules: .* is not a regular"),
}
"""Name -> the recipe, and what the message must say."""

OPTIONS = {
    "number of 5,000 digits": (["--set", f"seed={DIGITS}"], "--set 'seed=999.*too many digits"),
    "deep lists": (["--set", f"task.data={DEEP}"], "--set .*nested too deep"),
    "deep key": (["--set", "finetune." + ".".join("a" * 3000) + "=1"], r"finetune\.a: unknown key"),
    "stage a number": (["--set", "stage=3"], r"at least one \[\[stage\]\] table"),
    "stage a number, then a key of it": (["--set", "stage=3", "--set", "stage.1.epochs=1"], r"--set 'stage\.1\.epochs=1': stage is 3"),
    "model a text": (["--set", "model=bert"], r"model: a \[model\] table is needed, got 'bert'"),
    "model a text, and --model": (["--set", "model=bert", "--model", "x"], r"model: a \[model\] table is needed"),
    "task a text, and --data": (["--set", "task=bert", "--data", "x"], r"task: a \[task\] table is needed"),
    "stage by a superscript": (["--set", "stage.².epochs=3"], "no stage '²'"),
    "no value": (["--set", "x" * 5000], r"\(5002 characters\): KEY=VALUE is needed"),
    "--model of 5,000 characters": (["--model", LONG], "--model: .*too long for a path"),
    "--data of 5,000 characters": (["--model", "m", "--data", LONG], "--data: .*too long for a path"),
    "--cache a file": (["--cache", "file"], "--cache file: is a file; give a folder"),
    "--cache in a file": (["--cache", "file/cache"], "--cache file/cache: cannot be written: Not a directory; give another folder"),
    "--cache of 5,000 characters": (["--cache", LONG], "--cache m+: cannot be read: File name too long; give another folder"),
    "--cache in /proc": (["--cache", "/proc/cache"], "--cache /proc/cache: cannot be written: .*; give another folder"),
    "--out of 5,000 characters": (["--out", LONG], "--out m+: cannot be written: File name too long; give another folder"),
}
"""Name -> options for a recipe that is right, and what the message must say."""


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a command, which must end as bad input does; returns its message."""

    def call(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("in the way")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, f"{result.exception!r}\n{result.output}"
        message = result.stderr
        assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 1000, message
        return message

    return call


@pytest.mark.parametrize(("recipe", "said"), RECIPES.values(), ids=RECIPES)
def test_recipe(refused, tmp_path, recipe, said):
    (tmp_path / "r.toml").write_text(recipe)
    assert re.search(said, refused("run", "r.toml"))
    assert {path.name for path in tmp_path.iterdir()} == {"r.toml", "file"}, "a refused recipe leaves nothing behind"


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
def test_options(refused, tmp_path, options, said):
    (tmp_path / "r.toml").write_text(FILES)
    assert re.search(said, refused("run", "r.toml", *options))


@pytest.mark.parametrize("recipe", [LONG, "no\0file", "."], ids=["of 5,000 characters", "with NUL", "a folder"])
def test_path_of_the_recipe(refused, recipe):
    assert re.search("^error: recipe:? ", refused("run", recipe))


@pytest.mark.parametrize("command", ["list", "clear"])
def test_cache_that_is_a_file(refused, tmp_path, command):
    assert "--cache file: is a file; give a folder" in refused("cache", command, "--cache", "file")
    assert Path(tmp_path / "file").read_text() == "in the way"
