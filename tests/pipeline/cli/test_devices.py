"""``bench``, ``compare`` and ``devices`` as a person meets them: real runs on this machine, files they leave, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.pipeline.cli.test_main import pocketbert, refused

FILE = "tflite/model_int8.tflite"


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """(bundle, what bench --out wrote, what it printed) of a rapid run."""
    out = tmp_path_factory.mktemp("bench") / "a.json"
    bundle = str(tiny_run / "bundle")
    done = pocketbert("bench", bundle, "--tier", "rapid", "--file", FILE, "--threads", "1", "--lengths", "", "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    return bundle, out, done.stdout


def test_bench_prints_a_table_and_keeps_the_samples(measured):
    _, out, printed = measured
    document = json.loads(out.read_text(encoding="utf-8"))
    rows = document["targets"][0]["measurements"]
    assert [row["repeat"] for row in rows] == [False, True]
    assert sum(map(len, rows[0]["round_samples_ms"])) >= 64
    assert "local" in printed
    assert FILE in printed


def test_report_reads_a_bench_too(measured, tmp_path):
    _, out, _ = measured
    done = pocketbert("report", str(out), "--html", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert FILE in done.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


def test_compare_with_itself_sees_nothing_and_writes_for_ci(measured, tmp_path):
    _, out, _ = measured
    junit, markdown = tmp_path / "junit.xml", tmp_path / "table.md"
    done = pocketbert("compare", str(out), str(out), "--junit", str(junit), "--markdown", str(markdown))
    assert done.returncode == 0, done.stderr
    assert "no difference seen" in done.stdout
    assert ElementTree.parse(junit).getroot().attrib["failures"] == "0"
    assert "no difference seen" in markdown.read_text(encoding="utf-8")


def slowed(out, path, factor: float):
    document = json.loads(out.read_text(encoding="utf-8"))
    for row in document["targets"][0]["measurements"]:
        row["round_samples_ms"] = [[factor * sample for sample in samples] for samples in row["round_samples_ms"]]
        row["p50_ms"] *= factor
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_a_regression_ends_with_three(measured, tmp_path):
    _, out, _ = measured
    later, junit = slowed(out, tmp_path / "later.json", 3.0), tmp_path / "junit.xml"
    done = pocketbert("compare", str(out), str(later), "--max-regression", "5%", "--junit", str(junit))
    refused(done, 3, "got slower by more than 5 %", FILE)
    assert int(ElementTree.parse(junit).getroot().attrib["failures"]) == 1
    assert pocketbert("compare", str(out), str(later), "--max-regression", "400").returncode == 0
    assert pocketbert("compare", str(later), str(out)).returncode == 0


def test_bench_against_a_baseline(measured, tmp_path):
    bundle, out, _ = measured
    faster = slowed(out, tmp_path / "faster.json", 0.1)
    arguments = ["--tier", "rapid", "--file", FILE, "--threads", "1", "--lengths", "", "--quiet"]
    done = pocketbert("bench", bundle, *arguments, "--baseline", str(faster), "--out", str(tmp_path / "b.json"))
    refused(done, 3, "got slower by more than 5 %")
    assert (tmp_path / "b.json").is_file()


def test_an_unreachable_board_ends_with_four_and_the_rest_is_there(measured, tmp_path):
    bundle, _, _ = measured
    out = tmp_path / "c.json"
    arguments = ["--tier", "rapid", "--file", FILE, "--threads", "1", "--lengths", "", "--out", str(out)]
    done = pocketbert("bench", bundle, "--on", "local,ssh:nobody@127.0.0.1:9", *arguments)
    assert done.returncode == 4
    assert "ssh:nobody@127.0.0.1:9" in done.stderr
    here, board = json.loads(out.read_text(encoding="utf-8"))["targets"]
    assert (here["error"], len(here["measurements"])) == (None, 2)
    assert board["error"]["exit_code"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "rpi5"], ["'rpi5' is no target"]),
        (["--tier", "slow"], ["tier 'slow'", "rapid, quick, normal"]),
        (["--threads", "1,x"], ["--threads '1,x'"]),
        (["--cores", "fast"], ["--cores 'fast'"]),
        (["--max-regression", "a lot"], ["--max-regression 'a lot'"]),
        (["--texts", "nowhere.txt"], ["nowhere.txt: no such file"]),
        (["--baseline", "nowhere.json"], ["nowhere.json"]),
        (["--file", "model.pt"], ["no file 'model.pt'"]),
    ],
)
def test_bad_input_of_bench(arguments, words, tiny_run):
    refused(pocketbert("bench", str(tiny_run / "bundle"), *arguments), 2, *words)


def test_compare_refuses_what_is_no_measurement(tiny_run, tmp_path):
    refused(pocketbert("compare", str(tiny_run / "ledger.json"), str(tiny_run / "ledger.json")), 2, "not a bench document")
    refused(pocketbert("report", str(tmp_path)), 2, "no ledger.json there")


def test_devices_list_names_this_machine_and_says_what_is_missing():
    done = pocketbert("devices", "list", "--json")
    assert done.returncode == 0, done.stderr
    found = {device["on"]: device for device in json.loads(done.stdout)}
    assert found["local"]["ready"]
    assert "onnxruntime" in found["local"]["what"]
    assert "qemu:cortex-a76" in found


def test_devices_info_is_the_agents():
    done = pocketbert("devices", "info", "local")
    assert json.loads(done.stdout)["conditions"]["python"] == sys.version.split()[0]


def test_devices_setup_knows_its_names():
    refused(pocketbert("devices", "setup", "android"), 2, "unknown 'android'; known are qemu, qemu-armv7")


def test_built_runner_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path))
    done = pocketbert("devices", "build-runner", "x86_64")
    if done.returncode != 0:
        pytest.skip(done.stderr)
    answer = subprocess.run([done.stdout.strip(), "--mode", "info"], capture_output=True, text=True, timeout=60)
    assert "conditions" in json.loads(answer.stdout)
