"""Keys read from sources are those of the classes, and a misspelt one is told without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.flow.keys import first_unknown, keys_of
from pipeline.flow.recipe import nested_table
from pipeline.flow.registry import STAGES
from pipeline.tasks import TASKS

MISSPELT = {
    "a key of a stage": ('use = "finetune"\nepoch = 3\n', "", "finetune.epoch: unknown key; did you mean 'epochs'?"),
    "a key of a nested table": ('use = "layerdrop"\nheal = { epoch = 3 }\n', "", "layerdrop.heal.epoch: unknown key; did you mean 'epochs'?"),
    "a stage": ('use = "fintune"\n', "", "unknown 'fintune'; did you mean 'finetune'?"),
    "a key of the task": ('use = "finetune"\n', "max_lenght = 16\n", "task.max_lenght: unknown key; did you mean 'max_length'?"),
}


def keys_of_class(table) -> dict:
    nested = {name: nested_table(field.annotation) for name, field in table.model_fields.items()}
    return {name: None if kind is None else keys_of_class(kind) for name, kind in nested.items()}


@pytest.mark.parametrize("registry", [STAGES, TASKS], ids=["stages", "tasks"])
def test_keys_of_the_sources_are_those_of_the_classes(registry):
    for name, place in registry.built_in.items():
        assert keys_of(*place.split(":")) == keys_of_class(registry[name]), name


def test_the_path_of_an_unknown_key():
    keys = {"epochs": None, "heal": {"texts": {"copies": None}}}
    assert first_unknown({"heal": {"texts": {"copy": 1}}}, keys) == (("heal", "texts", "copy"), ["copies"])
    assert first_unknown({"epochs": {"a": 1}, "heal": 3}, keys) is None, "values are for the classes to judge"


@pytest.mark.parametrize(("stage", "task", "said"), MISSPELT.values(), ids=MISSPELT)
def test_a_misspelt_name_is_told_without_torch(tmp_path, stage, task, said):
    (tmp_path / "r.toml").write_text(f'[model]\nsource = "m"\n[task]\ndata = "d"\n{task}[[stage]]\n{stage}')
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pipeline.cli.main import app\n"
        "result = CliRunner().invoke(app, ['run', 'r.toml'])\nprint(result.stderr)\n"
        "assert result.exit_code == 2, result\nassert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
