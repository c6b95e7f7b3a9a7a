"""The command line as a person meets it: what it prints, where, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys

import pytest

POCKETBERT = [sys.executable, "-m", "pipeline.cli"]


def pocketbert(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*POCKETBERT, *arguments], capture_output=True, text=True, **options)


def refused(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_predict_reads_an_argument_or_lines(tiny_run):
    bundle = str(tiny_run / "bundle")
    one = pocketbert("predict", bundle, "turn on the light")
    assert one.returncode == 0, one.stderr
    label, probability = one.stdout.rstrip("\n").split("\t")
    assert label in ("on", "off", "music")
    assert 0 < float(probability) <= 1
    lines = pocketbert("predict", bundle, "--json", input="turn on the light\nplay the song\n" + "light " * 50)
    answers = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [answer["truncated"] for answer in answers] == [False, False, True]
    assert "1 texts were longer than 16 tokens and were cut" in lines.stderr
    assert answers[0]["answer"]["label"] == label


def test_predict_chooses_a_file_and_a_run_folder_will_do(tiny_run):
    done = pocketbert("predict", str(tiny_run), "play the song", "--file", "onnx/model_quantized.onnx")
    assert done.returncode == 0, done.stderr
    refused(pocketbert("predict", str(tiny_run), "x", "--file", "onnx/other.onnx"), 2, "no model file 'onnx/other.onnx'")


def test_verify_ends_with_five_on_one_flipped_byte(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "bundle", tmp_path / "b")
    done = pocketbert("verify", str(tmp_path / "b"), "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["models"]) == 4
    path = tmp_path / "b" / "tflite" / "model_int8.tflite"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))
    refused(pocketbert("verify", str(tmp_path / "b")), 5, "tflite/model_int8.tflite", "does not match its checksum")


def test_no_bundle_is_bad_input(tmp_path):
    refused(pocketbert("verify", str(tmp_path)), 2, "no bundle there")
    refused(pocketbert("predict", str(tmp_path), "x"), 2, "no bundle there")
    refused(pocketbert("report", str(tmp_path)), 2, "no ledger.json")


def test_report_prints_a_table_json_and_a_page(tiny_run, tmp_path):
    table = pocketbert("report", str(tiny_run))
    assert table.returncode == 0, table.stderr
    assert "TFLite int8" in table.stdout
    done = pocketbert("report", str(tiny_run / "bundle"), "--json", "--html", str(tmp_path / "r.html"))
    assert json.loads(done.stdout)["name"] == "tiny"
    page = (tmp_path / "r.html").read_text()
    assert "TFLite int8" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_methods_lists_stages_and_shows_one_with_paper_and_options():
    listed = pocketbert("methods")
    assert listed.returncode == 0, listed.stderr
    for name in ("finetune", "prune-vocab", "distill-mobilebert", "factorize-embeddings", "export", "quantize", "bench", "pack"):
        assert name in listed.stdout
    shown = pocketbert("methods", "distill-mobilebert")
    assert "arXiv:2004.02984" in shown.stdout
    assert "bottleneck_size = 128" in shown.stdout
    assert "Softens both distributions" in shown.stdout, "options of a shared base are explained too"
    for option in json.loads(pocketbert("methods", "distill-mobilebert", "--json").stdout)[0]["options"]:
        assert option["name"] in shown.stdout
    refused(pocketbert("methods", "distil-mobilebert"), 2, "did you mean 'distill-mobilebert'")


def test_init_writes_a_recipe_that_is_read_and_never_overwrites(tmp_path):
    path = tmp_path / "mine.toml"
    assert pocketbert("init", str(path)).returncode == 0
    assert 'name = "mine"' in path.read_text()
    refused(pocketbert("init", str(path)), 2, "exists already")
    refused(pocketbert("run", str(path), "--data", str(tmp_path / "absent"), "--model", str(tmp_path)), 2, "no folder", "absent")


def test_cache_lists_and_clears(tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    listed = json.loads(pocketbert("cache", "list", "--cache", str(tmp_path / "cache"), "--json").stdout)
    assert {entry["stage"] for entry in listed} >= {"finetune", "pack"}
    assert "MB freed" in pocketbert("cache", "clear", "--cache", str(tmp_path / "cache")).stdout
    assert json.loads(pocketbert("cache", "list", "--cache", str(tmp_path / "cache"), "--json").stdout) == []


def test_run_prints_the_table_and_json_goes_to_stdout_alone(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    arguments = ["run", str(tiny_recipe), "--model", str(tiny_model), "--data", str(tiny_data), "--cache", str(tiny_run.parent / "cache")]
    plain = pocketbert(*arguments, "--out", str(tmp_path / "a"))
    assert plain.returncode == 0, plain.stderr
    assert "TFLite int8" in plain.stdout
    assert "pocketbert predict" in plain.stdout
    assert "[1/8] finetune: cached" in plain.stderr
    done = pocketbert(*arguments, "--out", str(tmp_path / "b"), "--json", "--quiet")
    assert json.loads(done.stdout)["outcome"] == "published"
    assert done.stderr == ""


def test_a_failed_budget_ends_with_three(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    done = pocketbert(
        "run", str(tiny_recipe), "--model", str(tiny_model), "--data", str(tiny_data), "--cache", str(tiny_run.parent / "cache"),
        "--out", str(tmp_path / "out"), "--set", "budget.size_mb=0.001", "--quiet",
    )  # fmt: skip
    refused(done, 3, "budget allows 0.001", "No bundle is published")
    assert (tmp_path / "out" / "ledger.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "dmeo"], ["did you mean 'demo'"]),
        (["run", "demo", "--set", "task.max_lenght=3"], ["task.max_lenght: unknown key", "max_length"]),
        (["run", "demo", "--model", "nobody/nothing"], ["neither a folder nor in the hub's local cache"]),
        (["run", "demo", "--data", "builtin:other"], ["builtin:commands"]),
    ],
)
def test_bad_input_ends_with_two(arguments, words, tmp_path):
    refused(pocketbert(*arguments, "--out", str(tmp_path / "out"), cwd=tmp_path), 2, *words)


def test_a_read_only_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused(pocketbert("run", "demo", "--out", str(tmp_path / "file" / "x")), 2, "cannot be written")


def test_a_full_disk_is_told_and_the_same_command_goes_on(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    """A real file system of 400 kB under the output folder, in a mount namespace of its own."""
    out = tmp_path / "out"
    out.mkdir()
    command = [
        *POCKETBERT, "run", str(tiny_recipe), "--model", str(tiny_model), "--data", str(tiny_data),
        "--cache", str(tiny_run.parent / "cache"), "--out", str(out), "--quiet",
    ]  # fmt: skip
    mount = f"mount -t tmpfs -o size=400k tmpfs {out} && exec \"$@\""
    if subprocess.run(["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=400k tmpfs {out}"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system, so no small disk can be made")
    full = subprocess.run(["unshare", "--mount", "sh", "-c", mount, "sh", *command], capture_output=True, text=True)
    refused(full, 2, "No space left on device", "the same command goes on from there")
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_ctrl_c_stops_with_a_clean_message_and_keeps_the_work(tiny_recipe, tiny_model, tiny_data, tmp_path):
    heeds = ["env", "--default-signal=INT"]  # whoever starts the tests in the background has them ignore interrupts
    command = [*heeds, *POCKETBERT, "run", str(tiny_recipe), "--model", str(tiny_model), "--data", str(tiny_data)]
    command += ["--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o"), "--set", "finetune.epochs=500"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    while "step" not in "".join(lines):  # training, not importing
        lines.append(process.stderr.readline())
        assert process.poll() is None, lines
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped; finished stages and the last checkpoint are kept" in rest
    assert "Traceback" not in rest


def test_progress_draws_a_bar_on_a_terminal_and_plain_lines_when_piped(tiny_recipe, tiny_model, tiny_data, tmp_path):
    arguments = ["run", str(tiny_recipe), "--model", str(tiny_model), "--data", str(tiny_data), "--set", "budget.size_mb=0.001"]
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*POCKETBERT, *arguments, "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o"), "--set", "distill-mobilebert.logits.epochs=1"],
        stderr=side, stdout=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(side)
    shown = b""
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        try:
            shown += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    process.wait()
    text = shown.decode(errors="replace")
    assert "\x1b[" in text, "a live bar moves the cursor"
    assert "left" in text
    assert "loss" in text
    piped = pocketbert(*arguments, "--cache", str(tmp_path / "c2"), "--out", str(tmp_path / "o"), "--set", "distill-mobilebert.logits.epochs=1")
    assert "\x1b[" not in piped.stderr
    assert "step" in piped.stderr
