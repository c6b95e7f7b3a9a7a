"""The recipe: a TOML file that says what to compress, for what, how, and what the result must keep.

``[model]``, ``[task]``, ``[budget]``, ``[train]`` and ``[[stage]]`` tables in order. Every fault is reported with its place and,
for a misspelt name, with the nearest known one. A recipe never reaches outside: absolute paths and ``..`` are
refused; whoever runs it may point elsewhere on the command line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.flow.keys import first_unknown, keys_of
from pipeline.flow.registry import STAGES
from pipeline.flow.train_section import TrainSection
from pipeline.tasks import DEFAULT_KIND, TASKS
from runtimes.bundle import is_safe_name
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from pipeline.flow.stage import Stage
    from pipeline.tasks.base import Task

SECTIONS = ("model", "task", "budget", "train")
WRITTEN_ONCE = ("exported", "quantized", "tuned", "bundle")
"""Roles whose files have fixed names in the bundle and the ledger, so that one stage of a recipe writes them."""
LONGEST_SHOWN = 100
"""Characters of a faulty value that a message repeats."""
PRESETS = resources.files("pipeline") / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(_Section):
    source: str
    """Hub id or folder of a BERT-class encoder."""


class BudgetSection(_Section):
    metric_drop: float | None = Field(None, ge=0)
    """Points of the task's primary metric on validation rows that a shipped file may lose against the fine-tuned teacher."""
    recall_drop: float | None = Field(None, ge=0)
    """Points of recall that a shipped file may lose on any class with at least 20 validation rows; for text-classification with one label."""
    divergence: float | None = Field(None, gt=0)
    """Mean divergence on validation rows of a shipped file's answers from those of the model that it was written from; of classes in nats."""
    size_mb: float | None = Field(None, gt=0)
    """Megabytes (10^6 bytes) that each shipped file may have."""
    latency_ms: float | None = Field(None, gt=0)
    """Milliseconds per real input at p50 on one thread that each shipped file may take."""


class Recipe(_Section):
    """A checked recipe.

    ``task`` is the configured :class:`pipeline.tasks.base.Task`; ``stages`` holds one configured stage per ``[[stage]]`` table.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelSection
    task: Any
    budget: BudgetSection = BudgetSection()
    train: TrainSection = TrainSection()
    stages: list[Any] = []


def presets() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in PRESETS.iterdir() if path.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), model: str | None = None, data: str | None = None) -> Recipe:
    """Read a preset or a file, apply ``--set KEY=VALUE`` overrides, check everything.

    Args:
        name_or_path: name of a preset, or path of a TOML file.
        overrides: ``stage.2.layers=6``, ``task.max_length=32``; a stage is named by its place from 1 or by its name.
        model, data: what the command line puts in place of ``model.source`` and ``task.data``; these may be any path.

    Raises:
        BadInput: with the place of the first fault.
    """
    tables, origin = _read(name_or_path)
    for override in overrides:
        _override(tables, override)
    tables.setdefault("name", Path(origin).stem)
    for section in SECTIONS:
        if not isinstance(tables.get(section, {}), dict):
            raise BadInput(f"{origin}: {section}: a [{section}] table is needed, got {_shown(tables[section])}")
    for section, key, value in (("model", "source", model), ("task", "data", data)):
        if value is not None:
            tables.setdefault(section, {})[key] = value
            _refuse_impossible_path(f"--{section if section == 'model' else key}", value)
        else:
            named = str(tables.get(section, {}).get(key, ""))
            _refuse_impossible_path(f"{origin}: {section}.{key}", named)
            _refuse_unsafe(origin, f"{section}.{key}", named)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", str(tables["name"])):
        raise BadInput(f"{origin}: name: {_shown(tables['name'])} must be letters, digits, '.', '_' and '-', at most 100; it names a folder")
    stage_tables = tables.pop("stage", [])
    if not _are_tables(stage_tables) or not stage_tables:
        raise BadInput(f"{origin}: stage: at least one [[stage]] table is needed")
    _check_names(origin, tables.get("task"), stage_tables)
    try:
        recipe = Recipe(**tables)
    except ValidationError as error:
        raise BadInput(f"{origin}: " + _explain(error, "", Recipe)) from error
    recipe.task = task = _make_task(origin, recipe.task)
    if recipe.budget.recall_drop is not None:
        if not task.has_recalls:
            raise BadInput(f"{origin}: budget.recall_drop: needs labelled rows of one class each, as text-classification has them; leave it out")
        if task.recalls is False:
            raise BadInput(f"{origin}: task.recalls: false, but budget.recall_drop needs the recalls; leave one of them out")
        task.recalls = True
    recipe.stages = [_make_stage(origin, number, table) for number, table in enumerate(stage_tables, start=1)]
    if not any("baseline" in stage.gives for stage in recipe.stages):
        recipe.stages.insert(0, STAGES["adopt"]())  # what the source is, it is compared with
    check_order(recipe.stages, origin)
    if recipe.budget.latency_ms is not None and not any(stage.measures for stage in recipe.stages):
        raise BadInput(f"{origin}: budget.latency_ms: no stage measures latencies, so it could not be held; add a stage bench, or leave it out")
    if recipe.budget.divergence is not None and any(getattr(stage, "output", "logits") == "probabilities" for stage in recipe.stages):
        raise BadInput(f"{origin}: budget.divergence: it is measured on logits, and export.output = 'probabilities' gives none; leave one out")
    for stage in recipe.stages:
        stage.check_task(task)
        if stage.trains and not task.needs_labels:
            raise BadInput(f"{origin}: {stage.use} trains a model, and task.metric = {task.metric!r} judges none; name a metric that needs labels")
    return recipe


def check_order(stages: list[Stage], origin: str, source_leaves: Iterable[str] = ()) -> None:
    """Refuse, before any work, a stage whose input no earlier stage makes, whose work would be lost, or which cannot work on what it gets.

    Args:
        source_leaves: what the source model has of the things that :attr:`Stage.refuses` names.
    """
    made = {"source": "the recipe"}
    traits = dict.fromkeys(source_leaves, "the source model")
    files_of: dict[str, str] = {}
    missed: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        place = f"{origin}: stage[{number}].{stage.use}"
        _check_roles(stage, place)
        reads = [stage.reads.get(role, role) for role in stage.needs]
        for role in reads:
            if role not in made:
                makers = [name for name, stage_class in STAGES.items() if role in stage_class.gives]
                cure = f"put {' or '.join(makers)} before it" if makers else f"an earlier stage must say writes = {{ model = {json.dumps(role)} }}"
                raise BadInput(f"{place}: needs {role!r}, which no earlier stage makes; {cure}")
        for trait, maker in traits.items():
            if trait in stage.refuses:
                raise BadInput(f"{place}: cannot follow {maker}, which leaves {trait}: {stage.refuses[trait]}")
        for role in WRITTEN_ONCE:
            if role in stage.gives and role in files_of:
                raise BadInput(f"{place}: {files_of[role]} writes these files already, under the same names; keep one of the two")
            if role in stage.gives and role in missed:
                raise BadInput(f"{place}: comes after {missed[role]}, which would not see its files; put it before {missed[role]}")
        files_of |= {role: stage.use for role in stage.gives if role in WRITTEN_ONCE}
        missed |= {role: stage.use for role in stage.uses if role not in files_of and role not in missed}
        writes = [stage.writes.get(role, role) for role in stage.gives]
        if "model" in writes and not {"model", "source"} & set(reads):
            traits.clear()  # a model of its own
        if "model" in writes:
            traits |= dict.fromkeys(stage.leaves, stage.use)
        if "model" in writes and "exported" in made:
            raise BadInput(f"{place}: changes the model after {made['exported']} has written its files; put it before")
        for role in writes:
            made[role] = stage.use


def _check_roles(stage: Stage, place: str) -> None:
    """Refuse names in ``reads`` and ``writes`` that the stage does not have."""
    for key, known in (("reads", (*stage.needs, *stage.uses)), ("writes", stage.gives)):
        for role in getattr(stage, key):
            if role not in known:
                raise BadInput(f"{place}.{key}: the stage has no role {role!r}{_nearest(role, known) if known else ''}")


def lock_text(recipe: Recipe) -> str:
    """The recipe with every default written out, as TOML; it ships, so of paths on this machine only the last part stands in it."""
    lines = [f"name = {_toml(recipe.name)}", f"seed = {recipe.seed}"]
    for section in SECTIONS:
        first = {"kind": recipe.task.kind} if section == "task" else {}
        # What fits one machine is no part of the result, so [train] stands there only where the recipe says something of it.
        fields = getattr(recipe, section).model_dump(exclude_defaults=section == "train")
        named = {key: public_name(fields[key]) for key in ("source", "data") if key in fields}
        if fields or section != "train":
            lines += ["", f"[{section}]", *toml_pairs(first | fields | named)]
    for stage in recipe.stages:
        fields = stage.model_dump()
        places = {"on": [_public_place(place) for place in fields["on"]]} if isinstance(fields.get("on"), list) else {}
        lines += ["", "[[stage]]", f"use = {_toml(stage.use)}", *toml_pairs(fields | places)]
    return "\n".join(lines) + "\n"


def public_name(name: str) -> str:
    """A model or data folder as strangers may read it: what a recipe may name stands as it is, any other path loses all but its last part."""
    if name.startswith("builtin:") or is_safe_name(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _public_place(place: str) -> str:
    """A place to measure; of a lab file its name."""
    return f"@{public_name(place[1:])}" if place.startswith("@") else place


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    _refuse_impossible_path("recipe", name_or_path)
    path = Path(name_or_path)
    if name_or_path in presets():
        data, origin = (PRESETS / f"{name_or_path}.toml").read_bytes(), name_or_path
    elif path.is_file():
        data, origin = path.read_bytes(), name_or_path
    else:
        raise BadInput(f"recipe {_shown(name_or_path)}: no such file, and no preset of that name{_nearest(name_or_path, presets())}")
    try:
        return _parse(data.decode("utf-8"), origin), origin
    except UnicodeDecodeError as error:
        raise BadInput(f"{origin}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{origin}: not TOML: {error}") from error


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise BadInput(f"{place}: lists or tables are nested too deep; no key takes more than a list of lists") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise BadInput(f"{place}: a number has too many digits; write a smaller one") from error


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(table, dict) for table in value)


def _override(tables: dict[str, Any], text: str) -> None:
    key, separator, raw = text.partition("=")
    shown = _shown(text)
    if not separator:
        raise BadInput(f"--set {shown}: KEY=VALUE is needed, such as stage.2.layers=6")
    try:
        value = _parse(f"v = {raw}", f"--set {shown}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a text
    parts = key.strip().split(".")
    place: Any = tables
    stages = tables.get("stage", [])
    if not _are_tables(stages):
        raise BadInput(f"--set {shown}: stage is {_shown(stages)}, where [[stage]] tables are needed; set a key of one, such as stage.2.layers=6")
    known = [str(table.get("use")) for table in stages]
    if len(parts) > 1 and parts[0] in known:
        parts.insert(0, "stage")
    inner = parts[1:-1]
    if parts[0] == "stage" and len(parts) > 2:
        inner = parts[2:-1]
        if parts[1].isdecimal() and 1 <= int(parts[1]) <= len(stages):
            place = stages[int(parts[1]) - 1]
        elif parts[1] in known:
            place = stages[known.index(parts[1])]
        else:
            raise BadInput(f"--set {shown}: no stage {_shown(parts[1])}; the recipe has {', '.join(f'{i} {n}' for i, n in enumerate(known, 1))}")
    elif len(parts) > 1 and parts[0] in SECTIONS:
        place = place.setdefault(parts[0], {})
    elif len(parts) != 1:
        raise BadInput(f"--set {shown}: the key must be like seed, task.max_length, stage.2.layers or stage.2.heal.epochs")
    for key in inner:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place
    if not isinstance(place, dict):
        raise BadInput(f"--set {shown}: {'.'.join(parts[:-1])} is no table that could have a key {_shown(parts[-1])}")
    place[parts[-1]] = value


def _check_names(origin: str, task: Any, stage_tables: list[dict[str, Any]]) -> None:
    """Refuse unknown kinds and keys before the classes that have them are imported, which takes seconds."""
    places = [] if task is None else [("task.kind", "task.", TASKS, task.get("kind", DEFAULT_KIND), task)]
    for number, table in enumerate(stage_tables, start=1):
        places.append((f"stage[{number}].use", f"stage[{number}].{table.get('use')}.", STAGES, table.get("use"), table))
    for place, prefix, registry, name, table in places:
        if not isinstance(name, str) or name not in registry:
            raise BadInput(f"{origin}: {place}: unknown {_shown(name)}{_nearest(str(name), registry)}")
        if name not in registry.built_in:
            continue  # that of another package has its own ways
        keys = keys_of(*registry.built_in[name].split(":"))
        unknown = first_unknown({key: value for key, value in table.items() if key not in ("kind", "use")}, keys or {})
        if unknown is not None:
            path, known = unknown
            raise BadInput(f"{origin}: {prefix}{'.'.join(part[:LONGEST_SHOWN] for part in path)}: unknown key{_nearest(path[-1], known)}")


def _make_task(origin: str, table: Any) -> Task:
    fields = dict(table)
    kind = fields.pop("kind", DEFAULT_KIND)
    try:
        return TASKS[kind](**fields)
    except ValidationError as error:
        raise BadInput(f"{origin}: " + _explain(error, "task.", TASKS[kind])) from error


def _make_stage(origin: str, number: int, table: dict[str, Any]) -> Stage:
    fields = dict(table)
    name = fields.pop("use")
    try:
        return STAGES[name](**fields)
    except ValidationError as error:
        raise BadInput(f"{origin}: " + _explain(error, f"stage[{number}].{name}.", STAGES[name])) from error


def _explain(error: ValidationError, prefix: str, owner: type[BaseModel]) -> str:
    first = error.errors()[0]
    place = ".".join(str(part)[:LONGEST_SHOWN] for part in first["loc"]) or "together"
    if first["type"] == "extra_forbidden":
        for part in first["loc"][:-1]:
            owner = nested_table(owner.model_fields[part].annotation) or owner
        known = list(owner.model_fields)
        return f"{prefix}{place}: unknown key{_nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{prefix}{place}: missing"
    if first["type"] == "literal_error":
        allowed = re.findall("'(.*?)'", first["ctx"]["expected"])
        return f"{prefix}{place}: unknown {_shown(first['input'])}{_nearest(str(first['input']), allowed)}"
    return f"{prefix}{place}: {first['msg'].removeprefix('Value error, ')} (got {_shown(first['input'])})"


def nested_table(annotation: Any) -> type[BaseModel] | None:
    """The class of a table of keys, also where the table may be left out; None for a plain value."""
    return next((kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name[:LONGEST_SHOWN], known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _refuse_unsafe(origin: str, place: str, value: str) -> None:
    if value and not value.startswith("builtin:") and not is_safe_name(value):
        option = "--model" if place.startswith("model") else "--data"
        raise BadInput(
            f"{origin}: {place}: {_shown(value)} leaves the folder of the recipe; a recipe may only name what lies beside it. "
            f"Give such a path on the command line: {option} {value[:LONGEST_SHOWN]}"
        )


def _refuse_impossible_path(place: str, value: str) -> None:
    """Refuse what no file can be called, before a call of the system fails on it."""
    if "\0" in value:
        raise BadInput(f"{place}: {_shown(value)} has a NUL character, which no path can have")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise BadInput(f"{place}: {_shown(value)} is too long for a path: 255 bytes a name and 4,000 in all are allowed; move it to a shorter one")


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(toml_pairs(value)) + " }" if value else "{}"
    return repr(value)


def toml_pairs(fields: dict[str, Any]) -> list[str]:
    """``key = value`` of each that is not None."""
    return [f"{key} = {_toml(value)}" for key, value in fields.items() if value is not None]
