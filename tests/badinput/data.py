"""Data folders with something wrong in them, for all six tasks.

The recipes have one short ``finetune``, so that data which is read after all is trained on for a moment.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.badinput.harness import Case

RUN = ("run", "recipe.toml", "--model", "{model}", "--data", "data", "--out", "out", "--cache", "cache", "--quiet")
NOISY = RUN[:-1]
WHOLE = {
    "text-classification": {"text": "turn it on", "label": "on"},
    "text-classification of pairs": {"text": "turn it on", "text_pair": "lights on", "label": "same"},
    "text-classification with several labels": {"text": "turn it on", "label": ["on", "kitchen"]},
    "text-regression": {"text": "turn it on", "label": 1.5},
    "token-classification": {"tokens": ["turn", "it"], "tags": ["O", "B-DEVICE"]},
    "intent-and-slots": {"label": "on", "tokens": ["turn", "it"], "tags": ["O", "B-DEVICE"]},
    "sentence-embedding": {"text": "turn it on", "text_pair": "lights on", "label": 2.5},
}
"""A right row of every task that reads rows."""
FURTHER = {"text-classification of pairs": 'pair_column = "text_pair"\n', "text-classification with several labels": "multi_label = true\n"}
OTHER = {"label": {"on": "off", "same": "other"}}
MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "huge number": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "empty": "",
    "blanks": " \u2003\t",
    "line break": "a\nb",
    "object": {"a": 1},
    "empty list": [],
    "list of null": [None],
    "list of lists": [["a"]],
    "list of empty": [""],
    "deep": [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]],
    "half a surrogate": "\ud800",
    "NUL": "a\0b",
    "zero-width": "\u200b",
}
"""What every column of every task is given in turn."""
RIGHT = {
    ("text", "line break"),
    ("text", "NUL"),
    ("text", "zero-width"),
    ("text_pair", "line break"),
    ("tokens", "line break"),
    ("text_pair", "NUL"),
    ("text_pair", "zero-width"),
    ("label", "missing"),
    ("text_pair", "missing"),
}
"""Values that may be all right: a model gets them."""


def recipe(task: str, further: str = "") -> str:
    kind = task.split()[0]
    return (
        f'name = "bad"\n[model]\nsource = "unset"\n[task]\nkind = "{kind}"\ndata = "unset"\nmax_length = 16\n{FURTHER.get(task, "")}{further}'
        '[[stage]]\nuse = "finetune"\nepochs = 0.01\nbatch_size = 4\n'
    )


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(task: str, count: int = 8) -> list[dict[str, Any]]:
    """Right rows, with two classes or more."""
    made = []
    for number in range(count):
        row = copy.deepcopy(WHOLE[task])
        for column in ("text", "text_pair"):
            if column in row:
                row[column] += f" {number}"
        if number % 2 and "label" in row:
            label = row["label"]
            row["label"] = (
                {"on": "off", "same": "other"}.get(label, number) if isinstance(label, str) else ["off"] if isinstance(label, list) else number
            )
        made.append(row)
    return made


def folder(task: str, further: str = "", **splits: Any) -> dict[str, str | bytes]:
    """Files of a recipe and its data; splits that are not named are right, those that are None are left out."""
    files: dict[str, str | bytes] = {"recipe.toml": recipe(task, further)}
    for split in ("train", "validation", "test"):
        content = splits.get(split, rows_of(task) if split == "train" else rows_of(task)[:4])
        if content is not None:
            files[f"data/{split}.jsonl"] = lines(content) if isinstance(content, list) else content
    return files


def columns() -> Iterator[Case]:
    """Every column of every task with every value, in the second training row and in the last test row."""
    for task, row in WHOLE.items():
        for column in row:
            for number, (name, value) in enumerate(VALUES.items()):
                changed = {key: given for key, given in row.items() if key != column or value is not MISSING}
                if value is not MISSING:
                    changed[column] = value
                split, at = [("train", 2), ("test", 4)][number % 2]
                rows = rows_of(task)[: 8 if split == "train" else 4]
                rows[at - 1] = changed
                codes = (0, 2) if (column, name) in RIGHT else (2,)
                says = () if 0 in codes else (f"{split}.jsonl:{at}", "surrogate" if name == "half a surrogate" else column)
                yield Case(f"{task}: {column}: {name}", RUN, folder(task, **{split: rows}), says, codes)


SQUAD = {
    "data": [
        {
            "title": "one",
            "paragraphs": [{"context": "turn it on", "qas": [{"id": "7", "question": "what now", "answers": [{"text": "on", "answer_start": 8}]}]}],
        }
    ]
}
SQUAD_PLACES = {
    "data": ("data",),
    "article": ("data", 0),
    "title": ("data", 0, "title"),
    "paragraphs": ("data", 0, "paragraphs"),
    "paragraph": ("data", 0, "paragraphs", 0),
    "context": ("data", 0, "paragraphs", 0, "context"),
    "qas": ("data", 0, "paragraphs", 0, "qas"),
    "question": ("data", 0, "paragraphs", 0, "qas", 0),
    "id": ("data", 0, "paragraphs", 0, "qas", 0, "id"),
    "asked": ("data", 0, "paragraphs", 0, "qas", 0, "question"),
    "answers": ("data", 0, "paragraphs", 0, "qas", 0, "answers"),
    "answer": ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0),
    "text": ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "text"),
    "answer_start": ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"),
}
SQUAD_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "fraction": 8.5,
    "negative": -2,
    "huge": 10**30,
    "text": "x",
    "empty": "",
    "list": [],
    "list of null": [None],
    "object": {},
    "half a surrogate": "\ud800",
}


def squad() -> Iterator[Case]:
    """Every part of a SQuAD file with every value; one case runs over all values of a part that must be refused."""
    for part, path in SQUAD_PLACES.items():
        for name, value in SQUAD_VALUES.items():
            changed = copy.deepcopy(SQUAD)
            at: Any = changed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            fits = part in ("title", "id") and not (part == "id" and value == "\ud800")
            right = fits or (part in ("context", "asked") and name == "text")
            files = {"recipe.toml": recipe("question-answering", "stride = 2\n"), "data/train.json": json.dumps(changed)}
            files |= {f"data/{split}.json": json.dumps(SQUAD) for split in ("validation", "test")}
            yield Case(f"question-answering: {part}: {name}", RUN, files, () if right else ("train.json",), (0, 2) if right else (2,))


TABLE = "text,label\nturn it on,on\nturn it off,off\nlights on,on\nlights off,off\n"
GOOD = lines(rows_of("text-classification"))


def _raw() -> Iterator[tuple[str, str, str | bytes, tuple[str, ...], tuple[int, ...]]]:
    """(name, name of the training file, its content, what is said, exit codes)."""
    yield "empty file", "train.csv", "", ("train.csv", "no rows"), (2,)
    yield "blank lines", "train.jsonl", "\n \n\n", ("train.jsonl", "no rows"), (2,)
    yield "only a header", "train.csv", "text,label\n", ("train.csv", "no rows"), (2,)
    yield "one row", "train.csv", "text,label\na,b\n", ("at least two classes",), (2,)
    yield "duplicated header", "train.csv", "text,label,label\na,b,c\n", ("train.csv:1", "label"), (2,)
    yield "header with blanks", "train.csv", "text, label\na,b\n", ("no column 'label'", "text,  label"), (2,)
    yield "header in capitals", "train.csv", "Text,Label\na,b\n", ("train.csv:2", "no column 'text'"), (2,)
    yield "no header", "train.csv", "turn it on,on\nturn it off,off\n", ("no column 'text'",), (2,)
    yield "unbalanced quote", "train.csv", TABLE + '"lights on,on\n', ("train.csv:6", "quotation mark"), (2,)
    yield "quote inside", "train.csv", TABLE + '"a"b,on\n', ("train.csv:6", "not CSV"), (2,)
    yield "row too wide", "train.csv", TABLE + "a,b,c\n", ("train.csv:6", "2 columns", "quotation marks"), (2,)
    yield "row too narrow", "train.csv", TABLE + "a\n", ("train.csv:6",), (2,)
    yield "semicolons", "train.csv", TABLE.replace(",", ";"), ("train.csv:2", "no column 'text'", "text;label"), (2,)
    yield "NUL in csv", "train.csv", TABLE + "a\0b,on\n", (), (0, 2)
    yield "carriage returns alone", "train.csv", TABLE.replace("\n", "\r"), (), (0, 2)
    yield (
        "an unnamed column",
        "train.csv",
        "".join(f"{n},{line}\n" for n, line in zip(["", "0", "1", "2", "3"], TABLE.splitlines(), strict=True)),
        (),
        (0,),
    )
    yield "two unnamed columns", "train.csv", "text,label,,\na,b,1,2\nb,c,1,2\n", ("train.csv:1", "twice"), (2,)
    yield "byte order mark", "train.csv", "\ufeff" + TABLE, (), (0,)
    yield "UTF-16", "train.csv", TABLE.encode("utf-16"), ("train.csv:1", "UTF-16", "convert"), (2,)
    yield "UTF-16 without mark", "train.csv", TABLE.encode("utf-16-le"), ("train.csv", "UTF-16"), (2,)
    yield "UTF-32", "train.csv", TABLE.encode("utf-32"), ("train.csv",), (2,)
    yield "latin-1", "train.csv", (TABLE + "caf\xe9,on\n").encode("latin-1"), ("train.csv:6", "not UTF-8"), (2,)
    yield "gzip as csv", "train.csv", gzip.compress(TABLE.encode()), ("train.csv", "gzip", "unpack"), (2,)
    yield "gzip as jsonl", "train.jsonl", gzip.compress(GOOD.encode()), ("train.jsonl", "gzip"), (2,)
    yield "zip as csv", "train.csv", b"PK\x03\x04" + os.urandom(50), ("train.csv", "zip"), (2,)
    yield "parquet as csv", "train.csv", b"PAR1" + bytes(range(256)), ("train.csv", "Parquet"), (2,)
    yield "long csv field", "train.csv", TABLE + "x" * 200_000 + ",on\n", (), (0,)
    yield "long label", "train.csv", TABLE + f"a,{'x' * 200_000}\n", ("train.csv:6", "label"), (2,)
    yield "tsv with the commas of csv", "train.tsv", TABLE, ("train.tsv:2", "no column 'text'"), (2,)
    yield "csv with tabs", "train.csv", TABLE.replace(",", "\t"), ("train.csv:2", "no column 'text'"), (2,)
    yield "json array as jsonl", "train.jsonl", json.dumps(rows_of("text-classification")), ("train.jsonl:1", "one object a line"), (2,)
    yield "json over lines", "train.jsonl", json.dumps(rows_of("text-classification"), indent=1), ("train.jsonl:1", "one object a line"), (2,)
    yield "deep lists", "train.jsonl", GOOD + "[" * 100_000 + "]" * 100_000 + "\n", ("train.jsonl:9", "not JSON"), (2,)
    yield "deep objects", "train.jsonl", GOOD + '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n", ("train.jsonl:9",), (2,)
    yield "deep column", "train.jsonl", GOOD + '{"text": "a", "label": "on", "x": ' + "[" * 900 + "]" * 900 + "}\n", (), (0, 2)
    yield (
        "deep column with an escape",
        "train.jsonl",
        GOOD + '{"text": "\\u00e9", "label": ' + "[" * 900 + "]" * 900 + "}\n",
        ("train.jsonl:9",),
        (2,),
    )
    yield "number of 10,000 digits", "train.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 10_000 + "}\n", ("train.jsonl:9",), (2,)
    yield "number of 4,300 digits", "train.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 4_300 + "}\n", ("train.jsonl:9",), (2,)
    yield "key twice", "train.jsonl", GOOD + '{"text": "a", "label": "on", "label": "off"}\n', ("train.jsonl:9", "label", "twice"), (2,)
    yield "NaN as label", "train.jsonl", GOOD + '{"text": "a", "label": NaN}\n', ("train.jsonl:9", "label"), (2,)
    yield "half a surrogate as key", "train.jsonl", GOOD + '{"text": "a", "label": "on", "\\ud800": 1}\n', ("train.jsonl:9", "surrogate"), (2,)
    yield "surrogate in bytes", "train.csv", TABLE.encode() + b"\xed\xa0\x80,on\n", ("train.csv:6", "not UTF-8"), (2,)
    yield "conll for classification", "train.conll", "turn O\n", ("train.conll:1", "no column 'text'"), (2,)
    yield "text for classification", "train.txt", "turn it on\n", ("train.txt:1", "no column 'text'"), (2,)
    yield "other suffix", "train.json", GOOD, ("no train file", "train.json"), (2,)
    yield "capital suffix", "train.CSV", TABLE, ("no train file", "train.CSV"), (2,)
    yield "gzip suffix", "train.csv.gz", gzip.compress(TABLE.encode()), ("no train file", "train.csv.gz"), (2,)


def files_of_rows() -> Iterator[Case]:
    for name, file, content, says, codes in _raw():
        files = folder("text-classification", train=None) | {f"data/{file}": content}
        yield Case(name, RUN, files, says, codes)
    for task in ("token-classification", "intent-and-slots"):
        for name, content, says in (
            ("a token alone", "turn O\n\non\n", "train.conll:3"),
            ("no tags but O", "turn O\n", "nothing to learn"),
            ("empty", "", "no rows"),
            ("a tag that is none", "turn X-Y\n", "train.conll:1"),
            ("latin-1", b"caf\xe9 O\n", "train.conll:1"),
            ("only -DOCSTART-", "-DOCSTART- O\n\n", "no rows"),
        ):
            if task == "token-classification" or name in ("empty", "latin-1", "only -DOCSTART-"):
                yield Case(f"{task}: {name}", RUN, folder(task, train=None) | {"data/train.conll": content}, [says])
    for name, content in {
        "empty": "",
        "list": "[]",
        "null": "null",
        "deep": "[" * 100_000,
        "cut": '{"data": [',
        "gzip": gzip.compress(b"{}"),
    }.items():
        files = {"recipe.toml": recipe("question-answering", "stride = 2\n"), "data/train.json": content, "data/test.json": json.dumps(SQUAD)}
        yield Case(f"question-answering: {name}", RUN, files, ["train.json"])


def _directory(path: str):
    def prepare(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).mkdir()

    return prepare


def _link_to_itself(folder: Path) -> None:
    (folder / "data" / "train.jsonl").unlink()
    (folder / "data" / "train.jsonl").symlink_to("train.jsonl")


def _pipe(folder: Path) -> None:
    (folder / "data" / "train.jsonl").unlink()
    os.mkfifo(folder / "data" / "train.jsonl")


def _unreadable(folder: Path) -> None:
    (folder / "data" / "train.jsonl").chmod(0)


def places() -> Iterator[Case]:
    """What is not a file, or lies elsewhere."""
    task = "text-classification"
    whole = folder(task)
    yield Case("a folder in place of a file", RUN, whole, ["train.jsonl", "not a file"], prepare=_directory("data/train.jsonl"))
    yield Case("a link to itself", RUN, whole, ["train.jsonl", "not a file"], prepare=_link_to_itself)
    yield Case("a pipe", RUN, whole, ["train.jsonl", "not a file"], prepare=_pipe)
    if os.geteuid():
        yield Case("a file that may not be read", RUN, whole, ["train.jsonl"], prepare=_unreadable)
    run = list(RUN)
    for name, place, says in (
        ("no folder", "none", "no folder or file"),
        ("a path of 5,000 characters", "x" * 5000, "--data"),
        ("an empty name", "", "task.data"),
        ("NUL", "a\0b", "--data"),
        ("a device", "/dev/null", "/dev/null"),
        ("built in but unknown", "builtin:x", "builtin:commands"),
        ("half a surrogate", "\udc80", "task.data"),
        ("a number of the system", "/proc/self/mem", "/proc/self/mem"),
        ("the file itself", "data/train.jsonl/x", "task.data"),
    ):
        at = run.index("--data") + 1
        yield Case(f"--data: {name}", [*run[:at], place, *run[at + 1 :]], whole, [says])
    for name, content, says in (
        ("none", None, "no file 'more.txt'"),
        ("empty", "", "no lines of text"),
        ("latin-1", b"caf\xe9\n", "more.txt:1"),
        ("UTF-16", "a\n".encode("utf-16"), "UTF-16"),
        ("gzip", gzip.compress(b"a\n"), "gzip"),
    ):
        files = folder(task, 'unlabeled = "more.txt"\n') | ({} if content is None else {"data/more.txt": content})
        yield Case(f"unlabeled: {name}", RUN, files, [says])
    yield Case("unlabeled: path of 5,000 characters", RUN, folder(task, f'unlabeled = "{"x" * 5000}"\n'), ["task.unlabeled"])


def splits() -> Iterator[Case]:
    """Rows that are right one by one, in folders that are not."""
    for task in WHOLE:
        rows = rows_of(task)
        yield Case(f"{task}: one training row, no validation", RUN, folder(task, train=rows[:1], validation=None), ["validation file"])
        yield Case(f"{task}: one validation row, no test", RUN, folder(task, validation=rows[:1], test=None), ["test file"])
        yield Case(f"{task}: empty test", RUN, folder(task, test=[]), ["test.jsonl", "no rows"])
        yield Case(f"{task}: only train", RUN, folder(task, validation=None, test=None), ["no test file", "validation"])
        yield Case(f"{task}: test rows in train", NOISY, folder(task), ["rows of test also stand in train"], [0])
        for name in ("dev", "valid", "val"):
            files = folder(task, validation=None) | {f"data/{name}.jsonl": lines(rows[:4])}
            yield Case(f"{task}: {name}.jsonl", NOISY, files, [f"{name}.jsonl is taken as the validation rows"], [0])
    task = "text-classification"
    two = folder(task, validation=None) | {"data/dev.jsonl": GOOD, "data/val.csv": TABLE}
    yield Case("two files of validation rows", RUN, two, ["dev.jsonl", "val.csv", "one"])
    yield Case("validation and dev", RUN, folder(task) | {"data/dev.jsonl": GOOD}, ["validation.jsonl", "dev.jsonl"])
    yield Case("two training files", RUN, folder(task) | {"data/train.csv": TABLE}, ["train.jsonl", "train.csv"])
    squad_files = {
        "recipe.toml": recipe("question-answering", "stride = 2\n"),
        "data/train.json": json.dumps(SQUAD),
        "data/dev.json": json.dumps(SQUAD),
    }
    yield Case("question-answering: one article", RUN, squad_files, ["test file"])
    each_once = [{"text": f"{name} it", "label": name} for name in ("on", "off", "music")]
    yield Case("each class once, no validation", RUN, folder(task, train=each_once, validation=None, test=each_once[:1]), ["add a validation file"])
    slots = [{"label": name, "tokens": ["a"], "tags": ["B-X"]} for name in ("on", "off", "music")]
    yield Case(
        "each intent once, no validation", RUN, folder("intent-and-slots", train=slots, validation=None, test=slots[:1]), ["add a validation file"]
    )
    for name, label in {"case": "ON", "blanks": " on", "Unicode form": "o\ufb01", "inner blanks": "o  fi"}.items():
        base = {"Unicode form": "ofi", "inner blanks": "o fi"}.get(name, "on")
        rows = [{"text": f"text {n}", "label": (base, label, "off")[n % 3]} for n in range(9)]
        yield Case(f"labels that differ in {name}", NOISY, folder(task, train=rows, validation=rows[:3], test=rows[3:6]), ["differ only in"], [0])
    rows = rows_of(task)
    yield Case("an unseen label", RUN, folder(task, test=[{"text": "a", "label": "strange"}]), ["test.jsonl:1", "strange"])
    yield Case("positive that is none", RUN, folder(task, 'positive = "x"\n'), ["task.positive"])
    yield Case("out of scope, no file", RUN, folder(task, 'out_of_scope = "oos"\n'), ["task.out_of_scope"])
    yield Case("out of scope, a path up", RUN, folder(task, f'out_of_scope = "{"x" * 5000}"\n'), ["task.out_of_scope"])
    embedding = rows_of("sentence-embedding")
    yield Case("every score alike", RUN, folder("sentence-embedding", train=[row | {"label": 1} for row in embedding]), (), (0, 2))
    yield Case("pairs and texts mixed", RUN, folder("sentence-embedding", train=[*embedding, {"text": "a"}]), ["8 of 9"])
    yield Case(
        "scores of 1e308",
        RUN,
        folder("text-regression", train=[{"text": "a", "label": 1e308}, {"text": "b", "label": -1e308}] * 4),
        ["label"],
        (0, 2, 3),
    )


CASES = [*columns(), *squad(), *files_of_rows(), *places(), *splits()]
