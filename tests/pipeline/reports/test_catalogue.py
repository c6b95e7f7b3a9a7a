"""What a user is shown of stages and tasks: what must be given, what may be chosen, and the defaults of this stage."""

from __future__ import annotations

import json

import pytest

from pipeline.flow.registry import STAGES
from pipeline.flow.stage import Stage
from pipeline.reports.catalogue import describe_stage, describe_task, stage_text, task_text
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task


def by_name(options: list[dict]) -> dict[str, dict]:
    return {option["name"]: option for option in options}


@pytest.mark.parametrize("kind", TASKS.built_in)
def test_a_task_shows_what_a_recipe_must_say_and_what_predict_takes(kind):
    shown = describe_task(TASKS[kind])
    json.dumps(shown)
    assert [option["name"] for option in shown["options"] if option["required"]] == ["data"]
    names = [option["name"] for option in shown["options"]]
    common = [name for name in names if name in Task.model_fields]
    assert names[-len(common) :] == common, "a task's own options first, inherited ones among them"
    usual = TASKS[kind](data="none")
    assert shown["metrics"][0]["name"] == usual.primary.name and len(shown["metrics"]) == len(usual.metrics)
    assert shown["predict"] == list(usual.columns)
    text = task_text(shown)
    assert "data   (required)" in text and f"{usual.primary.name}: " in text


@pytest.mark.parametrize("name", STAGES.built_in)
def test_a_stage_shows_the_defaults_that_it_has(name):
    stage = STAGES[name]
    shown = describe_stage(stage)
    json.dumps(shown)
    made = stage.model_construct()
    for option in shown["options"]:
        value = getattr(made, option["name"])
        if option["options"]:
            assert {inner["name"]: inner["default"] for inner in option["options"]} == value.model_dump(mode="json")
        elif not option["required"]:
            assert option["default"] == json.loads(json.dumps(value, default=list))
    assert [option["name"] for option in shown["options"][-2:]] == list(Stage.model_fields)


def test_choices_are_listed_and_only_where_there_are_no_others():
    finetune = by_name(describe_stage(STAGES["finetune"])["options"])
    assert finetune["precision"]["choices"] == ["auto", "bf16", "fp32"] and finetune["epochs"]["choices"] is None
    assert by_name(describe_stage(STAGES["export"])["options"])["formats"]["choices"] == ["onnx", "tflite"]
    assert by_name(describe_task(TASKS["text-classification"])["options"])["threshold"]["choices"] is None, "a number may stand there too"
    assert 'precision = "auto"   one of auto, bf16, fp32' in stage_text(describe_stage(STAGES["finetune"]))
