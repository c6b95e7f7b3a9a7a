"""A whole bench of a bundle on an arm64 machine, over both ways that lead to it: SSH with the Python agent, ADB with the C runner."""

from __future__ import annotations

import pytest

from device_bench.bench import Plan, bench, failed
from device_bench.lab import parse_places
from device_bench.runner_build import build_runner
from runtimes.bundle import open_bundle

FILES = ["onnx/model_quantized.onnx", "tflite/model_int8.tflite"]


@pytest.fixture
def lab(vm, aarch64, tmp_path, monkeypatch):
    """A lab file that names the machine twice."""
    monkeypatch.setenv("POCKETBERT_SSH", f"ssh -F '{vm.config}'")
    runner = build_runner("aarch64", str(aarch64.compiler))
    libraries = [str(aarch64.library(kind)) for kind in ("onnx", "tflite")]
    path = tmp_path / "lab.toml"
    path.write_text(
        '[[target]]\non = "ssh:board"\nname = "by ssh"\nprovision = true\nemulated = true\n'
        f'[[target]]\non = "adb:{vm.serial}"\nname = "by adb"\nrunner = "{runner}"\nlibraries = {libraries}\nemulated = true\n',
        encoding="utf-8",
    )
    vm.connect_adb()
    with vm.adb.found_by_default():
        yield path


def test_two_files_agree_over_ssh_and_over_adb(lab, tiny_run):
    bundle = open_bundle(tiny_run / "bundle")
    document = bench(bundle, parse_places(f"@{lab}"), Plan(files=FILES), print)
    assert failed(document) == []
    cases = len(list(bundle.golden_cases()))
    for target in document["targets"]:
        assert target["emulated"]
        assert target["measurements"] == []
        assert target["conditions"]["architecture"] == "aarch64"
        assert {row["file"] for row in target["agreement"]} == set(FILES)
        for row in target["agreement"]:
            assert row["texts"] == cases
            assert row["worst_difference"] <= row["tolerance"]
    assert ["c runner" in str(target["conditions"]["agent"]) for target in document["targets"]] == [False, True]
