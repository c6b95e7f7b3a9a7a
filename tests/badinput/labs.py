"""Lab files, arguments of ``bench`` and measurements with something wrong in them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.badinput.harness import Case

BENCH = ("bench", "{bundle}", "--tier", "rapid", "--file", "onnx/model.onnx", "--threads", "1", "--lengths", "", "--quiet")
LAB = (*BENCH, "--on", "@lab.toml")
HEAD = '[[target]]\non = "local"\n'


def labs() -> Iterator[Case]:
    values = {
        "inf": "inf",
        "-inf": "-inf",
        "nan": "nan",
        "negative": "-1",
        "zero": "0",
        "huge": "9" * 400,
        "text": '"x"',
        "empty": '""',
        "list": "[]",
        "table": "{}",
        "true": "true",
        "date": "1979-05-27",
        "list of list": "[[1]]",
        "long": f'"{"x" * 5000}"',
        "NUL": '"a\\u0000b"',
        "list of huge": f"[{'9' * 400}]",
        "list of negative": "[-1]",
    }
    for key in ("name", "python", "cores", "threads", "memory_cap_mb", "deadline_s", "on", "provision"):
        for name, value in values.items():
            right = key == "name" and name in ("text", "empty", "long")
            head = "[[target]]\n" if key == "on" else HEAD
            if right or (key, name) in (("python", "empty"),):
                continue
            yield Case(f"lab: {key}: {name}", LAB, {"lab.toml": f"{head}{key} = {value}\n"}, ["lab.toml" if key != "python" else "python"], (2, 4))
    for name, content, says in (
        ("empty", "", "[[target]]"),
        ("no TOML", "[[", "lab.toml"),
        ("not UTF-8", b"\xff", "lab.toml"),
        ("deep lists", "x = " + "[" * 5000 + "]" * 5000, "lab.toml"),
        ("deep tables", "[" + ".".join("a" * 3000) + "]\n", "lab.toml"),
        ("number of 10,000 digits", f"{HEAD}deadline_s = {'9' * 10_000}\n", "lab.toml"),
        ("target is a table", "[target]\non = 'local'\n", "[[target]]"),
        ("target is a list", "target = [1]\n", "[[target]]"),
        ("UTF-16", HEAD.encode("utf-16"), "lab.toml"),
        ("unknown key", HEAD + "thread = [1]\n", "threads"),
        ("misspelt kind", '[[target]]\non = "locl"\n', "local"),
        ("twice", HEAD * 2, "twice"),
        ("a python that is not there", HEAD + 'python = "/none/python"\n', "/none/python"),
        ("python is a folder", HEAD + 'python = "/"\n', "python"),
        ("python is no program", HEAD + 'python = "/etc/passwd"\n', "/etc/passwd"),
        ("python prints nothing", HEAD + 'python = "/bin/true"\n', "python"),
    ):
        yield Case(f"lab: {name}", LAB, {"lab.toml": content}, [says], (2, 4))
    yield Case("lab: no file", LAB, {}, ["lab.toml"])
    for name, on in {"folder": "@.", "no name": "@", "long path": "@" + "x" * 5000, "device": "@/dev/null", "NUL": "@a\0b"}.items():
        yield Case(f"lab: {name}", (*BENCH, "--on", on), {}, ["lab file"])
    for on in (
        "",
        ",",
        "local,local",
        "ssh:",
        "qemu:",
        "local:1",
        "x" * 5000,
        "ssh:\udc80",
        "adb:\0",
        "qemu:z80",
        "ssh:a@b:99999999",
        "ssh:a@b:x",
        "ssh:-oProxyCommand=x",
    ):
        yield Case(f"--on {on[:20]!a}", (*BENCH, "--on", on), {}, (), (2, 4))


def arguments() -> Iterator[Case]:
    huge, zero = "9" * 400, "0"
    for option, values in {
        "--threads": ("1e6", "1000000", huge, zero, "-1", "1,1", "x", "1;2", "\u0663", "1.0"),
        "--lengths": ("5,5,5", zero, "-1", huge, "x", "\u0663", "8,8"),
        "--cores": ("", "9999", "-1", huge, "0,0", "x", "biggest", "0-3"),
        "--tier": ("", "slow"),
        "--file": ("", "../bundle.json", "x" * 5000),
        "--sustained": ("inf", "nan", "-1", "1e300"),
        "--memory-cap": ("inf", "nan", "0", "-1", "1e300", "x"),
        "--max-regression": ("inf", "nan", "-1", "x", "1e9"),
        "--most-texts": (zero, "-1", huge, "x"),
    }.items():
        for value in values:
            given = list(BENCH)
            if option in given:
                given[given.index(option) + 1] = value
            else:
                given += [option, value]
            yield Case(f"{option} {value[:12]!a}", given, {}, [option] if option not in ("--tier", "--file") else (), (2,))
    for name, file, content, says in (
        ("latin-1", "t.txt", b"caf\xe9\n", "t.txt:1"),
        ("UTF-16", "t.txt", "a\n".encode("utf-16"), "t.txt:1"),
        ("empty", "t.txt", "", "no text"),
        ("gzip", "t.csv", b"\x1f\x8b\x08abc", "gzip"),
        ("latin-1 table", "t.csv", b"text\ncaf\xe9\n", "t.csv:2"),
        ("no column", "t.csv", "a\nb\n", "t.csv"),
        ("deep", "t.jsonl", "[" * 100_000, "t.jsonl:1"),
        ("surrogate", "t.jsonl", '{"text": "\\ud800"}\n', "surrogate"),
        ("number", "t.jsonl", '{"text": 1}\n', "t.jsonl:1"),
        ("null", "t.jsonl", '{"text": null}\n', "t.jsonl:1"),
        ("other suffix", "t.doc", "a", ".txt"),
    ):
        yield Case(f"--texts {name}", (*BENCH, "--texts", file), {file: content}, [says])
    for name in ("none.txt", ".", "x" * 5000, "a\0b", "/dev/null"):
        yield Case(f"--texts {name[:12]!a}", (*BENCH, "--texts", name), {}, ["--texts"])
    for option in ("--out", "--junit", "--markdown"):
        for name in ("none/a.json", ".", "x" * 5000, "/proc/a.json"):
            extra = () if option == "--out" else ("--baseline", "whole.json")
            yield Case(f"{option} {name[:12]!a}", (*BENCH, option, name, *extra), {}, [option])


WHOLE = {
    "--json": ("report", "bad.json", "--json"),
    "html": ("report", "bad.json", "--html", "page.html"),
    "compare": ("compare", "bad.json", "bad.json"),
}
DAMAGED = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "not UTF-8": b"\xff\xfe{",
    "NaN": b'{"format": NaN}',
    "no version": b'{"format": "pocketbert bench"}',
    "newer": b'{"format": "pocketbert bench 99"}',
    "digits": b'{"format": "pocketbert bench \xc2\xb2"}',
    "version of 10,000 digits": b'{"format": "pocketbert bench ' + b"9" * 10_000 + b'"}',
    "number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "format alone": b'{"format": "pocketbert bench 2"}',
    "old format alone": b'{"format": "pocketbert bench 1"}',
    "gzip": b"\x1f\x8b",
}


def documents() -> Iterator[Case]:
    """Files that are no measurement at all."""
    for name, content in DAMAGED.items():
        for command, given in WHOLE.items():
            yield Case(f"{command}: {name}", given, {"bad.json": content}, ["bad.json"])
    for name in ("none.json", ".", "x" * 5000, "a\0b", "/dev/null"):
        yield Case(f"compare {name[:12]!a}", ("compare", name, name))
        yield Case(f"report {name[:12]!a}", ("report", name))


CASES = [*labs(), *arguments(), *documents()]
