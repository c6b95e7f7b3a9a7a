"""The local target: real jobs, and children that hang, crash, chatter or lie."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from device_bench.targets import LocalTarget, OutOfMemory, all_threads, parse_answer
from runtimes.backends import installed_formats
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable


@pytest.fixture
def target_running(tmp_path):
    """A local target whose agent is this source."""

    def make(source: str, deadline_s: float = 60.0) -> LocalTarget:
        path = tmp_path / "other_agent.py"
        path.write_text(source, encoding="utf-8")
        return LocalTarget(deadline_s=deadline_s, grace_s=0, agent=path)

    return make


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_all_threads():
    assert all_threads() >= 1


def test_info():
    info = LocalTarget().info()
    assert info["formats"] == installed_formats()
    assert info["conditions"]["python"]


def test_runs_a_job_with_relative_paths(onnx_file, make_job, monkeypatch):
    monkeypatch.chdir(onnx_file.parent)
    answer = LocalTarget().run(make_job(onnx_file, model=onnx_file.name))
    assert answer["cases"][0]["count"] == 12


def test_missing_file(tmp_path, make_job):
    with pytest.raises(BadInput, match=r"local: .*gone\.onnx: no such file"):
        LocalTarget().run(make_job(tmp_path / "gone.onnx"))


def test_child_has_a_clean_environment(target_running, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/kept")
    answer = target_running("import json, os\nprint(json.dumps(dict(os.environ)))").run({})
    assert "OMP_NUM_THREADS" not in answer
    assert answer["PYTHONPATH"] == "/kept"


def test_hang_is_killed_with_its_children(target_running, tmp_path):
    pids = tmp_path / "pids.json"
    source = (
        "import json, os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"pathlib.Path({str(pids)!r}).write_text(json.dumps([os.getpid(), child.pid]))\n"
        "time.sleep(300)\n"
    )
    with pytest.raises(TargetUnreachable, match="local: no answer within 3 s; it was killed"):
        target_running(source, deadline_s=3).run({})
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in json.loads(pids.read_text(encoding="utf-8"))):
        assert time.monotonic() < deadline, "a process of the job is still there"
        time.sleep(0.05)


def test_crash_names_the_signal(target_running):
    source = "import os, signal, sys\nsys.stderr.write('last words')\nsys.stderr.flush()\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(TargetUnreachable, match="signal SIGKILL; it printed nothing; stderr ends with 'last words'"):
        target_running(source).run({})


def test_output_that_is_not_json_is_quoted(target_running):
    with pytest.raises(TargetUnreachable, match="exit code 0; its output is not JSON and starts with 'Welcome to board"):
        target_running("print('Welcome to board 7 {}')").run({})


def test_two_documents_are_no_answer(target_running):
    with pytest.raises(TargetUnreachable, match="not JSON"):
        target_running("print('{}')\nprint('{}')").run({})


@pytest.mark.parametrize(
    ("kind", "error_class"),
    [
        ("bad_job", BadInput), ("missing_runtime", BadInput), ("too_long", BadInput), ("unreadable_model", IntegrityError),
        ("wrong_output", IntegrityError), ("failed_inference", IntegrityError), ("internal", TargetUnreachable),
        ("from a newer agent", TargetUnreachable),
    ],
)  # fmt: skip
def test_each_kind_of_error(kind, error_class):
    with pytest.raises(error_class, match=r"^rpi5: it says why$"):
        parse_answer("rpi5", 1, json.dumps({"error": {"kind": kind, "message": "it says why"}}), "")


@pytest.mark.parametrize("stdout", ["[1]", '{"error": "odd"}', '{"error": {"kind": "too_long"}}'])
def test_json_that_is_not_the_agents(stdout):
    with pytest.raises(TargetUnreachable, match="rpi5: "):
        parse_answer("rpi5", 0, stdout, "")


def test_an_answer_with_a_bad_ending_is_refused():
    with pytest.raises(TargetUnreachable, match="ended with signal SIGSEGV"):
        parse_answer("rpi5", -11, "{}", "")


def test_memory_cap_ends_a_job_that_does_not_fit(onnx_file, make_job):
    with _caps_or_skip(20_000_000) as target, pytest.raises(OutOfMemory, match=r"out of memory: killed by the kernel; it held \d+ MB at most"):
        target.run(make_job(onnx_file, mode="memory"))


def test_memory_cap_leaves_a_job_alone_that_fits(onnx_file, make_job):
    with _caps_or_skip(1_000_000_000) as target:
        assert target.run(make_job(onnx_file, mode="memory"))["memory"]["peak_bytes"] < 1_000_000_000


def _caps_or_skip(cap_bytes: int) -> LocalTarget:
    target = LocalTarget(memory_cap_bytes=cap_bytes)
    try:
        with target._capped():
            return target
    except BadInput as error:
        pytest.skip(str(error))


def test_memory_groups_are_gone_afterwards():
    with _caps_or_skip(1_000_000_000)._capped() as group:
        assert group.is_dir()
    assert not group.exists()
