"""The house: imports go one way, the device packages stay light, the wheel holds the four packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "runtimes": set(),
    "exporters": {"runtimes"},
    "device_bench": {"runtimes"},
    "pipeline": {"runtimes", "exporters", "device_bench"},
}
ROOMS = {
    "cli": {"reports", "stages", "methods", "learning", "flow", "models", "tasks"},
    "reports": {"learning", "flow", "models", "tasks"},
    "stages": {"learning", "flow", "models", "tasks"},
    "methods": {"learning", "flow", "models", "tasks"},
    "learning": {"flow", "models", "tasks"},
    "flow": {"models", "tasks"},
    "models": {"tasks"},
    "tasks": set(),
}
"""Room of pipeline/ -> rooms it may import. The engine finds stages by name through the registry, so flow imports none of them."""
ON_A_BOARD = {"numpy", "tokenizers", "onnxruntime", "ai_edge_litert", "tflite_runtime"}


def imported_by(package: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names.add((node.module or "").split(".")[0])
        found[path.relative_to(ROOT).as_posix()] = names
    assert found, f"{package} has no modules"
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    forbidden = set(MAY_IMPORT) | {"tests", "benchmarks"}
    for path, names in imported_by(package).items():
        assert not names & (forbidden - MAY_IMPORT[package] - {package}), path


def imports(package: str) -> dict[str, set[str]]:
    """Module -> modules of the project that it imports, those inside functions and for type checkers included."""
    paths = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): p for p in (ROOT / package).rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in paths else node.module for alias in node.names}
        found[module] = {name for name in names if name in paths} - {module}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    for module, names in imports("pipeline").items():
        if module.startswith(f"pipeline.{room}."):
            used = {name.split(".")[1] for name in names if name.count(".")} - {room}
            assert used <= ROOMS[room], f"{module} imports from {sorted(used - ROOMS[room])}"


def test_every_module_of_the_pipeline_has_a_room():
    assert {module.split(".")[1] for module in imports("pipeline") if module != "pipeline"} == set(ROOMS)


def test_methods_hold_methods_alone():
    """Each file but the packages' own registers a stage."""
    from pipeline.flow.registry import STAGES

    registered = {target.partition(":")[0] for target in STAGES.built_in.values()}
    files = {name for name in imports("pipeline") if name.startswith("pipeline.methods.") and name.count(".") > 2}
    assert files == {name for name in registered if name.startswith("pipeline.methods.")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_circle_of_imports(package):
    graph = imports(package)
    left = dict(graph)
    while left:
        free = {module for module, names in left.items() if not names & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}


def test_runtimes_need_numpy_tokenizers_and_a_runtime_only():
    for path, names in imported_by("runtimes").items():
        assert names - {"runtimes"} <= ON_A_BOARD | set(sys.stdlib_module_names), path


RUN_TIME_ONLY = """
import sys
HEAVY = {"torch", "transformers", "accelerate", "optimum", "onnx", "litert_torch", "ai_edge_quantizer", "safetensors", "jax", "huggingface_hub"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Refuse())
from pipeline.cli.main import app
app(sys.argv[1:])
"""


def run_time_only(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process where only the run-time dependencies can be imported."""
    return subprocess.run([sys.executable, "-c", RUN_TIME_ONLY, *arguments], capture_output=True, text=True, **options)


def test_command_line_starts_with_run_time_dependencies_only():
    done = run_time_only("--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_predict_verify_and_report_load_no_torch_and_no_transformers(tiny_run):
    for arguments in (["predict", str(tiny_run / "bundle"), "turn on the light"], ["verify", str(tiny_run / "bundle")], ["report", str(tiny_run)]):
        done = run_time_only(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_missing_training_libraries_are_named(tmp_path):
    done = run_time_only("run", "demo", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "pocketbert[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_no_torch():
    code = """if True:
        import sys
        from pipeline.cli.main import app
        try:
            app(["--help"])
        except SystemExit:
            print("torch" in sys.modules, "pydantic" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_wheel_holds_exactly_the_four_packages(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(MAY_IMPORT)
    assert "pipeline/recipes/demo.toml" in names
    assert "device_bench/agent/agent.py" in names


def test_the_readme_quotes_the_committed_results_unchanged():
    """Between the markers stands what the committed file gives, or nothing where there is no file."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from tables import filled
    finally:
        sys.path.pop(0)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme) == readme
