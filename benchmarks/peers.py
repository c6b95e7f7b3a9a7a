"""The same weights in every converter's int8 file and in ours, side by side: ``results/peers.json``.

    python benchmarks/peers.py [--case clinc150|bert-base|mobilebert]... [--record] [--model FOLDER] [--rounds N] [--texts N]

Every peer is installed from its pinned ``benchmarks/peers/PEER.txt`` into an environment of its own below ``--out``, and
driven by ``benchmarks/peers/PEER.py`` there. Rounds are interleaved (each row once, in a fresh process, then the next
round) and every row is timed by the same lines of ``device_bench/agent/agent.py`` on one thread; nothing else should run.
A peer that cannot be installed, converts nothing or breaks is listed with its error. The exit code is 3 if a figure
misses its mark.

    clinc150     MiniLM fine-tuned on CLINC150, real test texts; accuracy of every file over the whole test set
    bert-base    the shape of BERT-base, random weights, exactly 128 tokens
    mobilebert   the shape of MobileBERT (24 layers), random weights, exactly 128 tokens
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tables import peers_table

from device_bench.agent.agent import latency_summary, write_inputs
from device_bench.measurement import WARMUP
from device_bench.targets import AGENT, LocalTarget
from pipeline.flow.cache import Cache, digest, library_versions
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.hub import load_encoder, save_for_transformers
from pipeline.models.hub_fields import read_config
from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, PocketbertError

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "peers"
RESULTS = ROOT / "results" / "peers.json"
OURS = "pocketbert"

PEERS = {
    "optimum_ort": ("optimum_ort", "optimum_ort_per_tensor", "optimum_ort_fused"),
    "executorch_xnnpack": ("executorch", "executorch_default"),
    "litert_stock": ("litert_default", "litert_bucketed"),
    "openvino_nncf": ("openvino_nncf", "openvino_nncf_bucketed"),
    "torch_eager": ("torch_fp32", "torch_int8"),
}
"""Name of a peer's script and requirements -> its rows."""
NOT_INT8 = ("torch_fp32",)
BUILD_SECONDS, RUN_SECONDS = 3600, 1800
CALIBRATION_TEXTS = 300
# What a child needs of the caller's environment; one thread, no connections, no telemetry.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
_FIXED = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "NNCF_CI": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A case before its model is made.

    Args:
        buckets: lengths that bucketed files are made for, in tokens; the largest holds every text.
        default_length: the one length that a converter pads to when nobody tells it about buckets.
        texts: how many are timed in each round.
        rows: rows of peers that take part.
    """

    buckets: list[int]
    default_length: int
    texts: int
    rows: tuple[str, ...]


_SPEED_ROWS = ("optimum_ort", "optimum_ort_per_tensor", "executorch", "litert_default")
CASES = {
    "clinc150": Shape([16, 32, 64], 128, 1000, tuple(row for rows in PEERS.values() for row in rows)),
    "bert-base": Shape([128], 128, 100, _SPEED_ROWS),
    "mobilebert": Shape([128], 128, 100, _SPEED_ROWS),
}


@dataclass
class Case:
    """A case ready to run.

    Args:
        model: the folder that transformers reads; :func:`load_encoder` reads the same.
        timed: ids of the texts to time.
        tested: ids of the texts whose logits are compared.
        labels: class index of each tested text; None where the weights are random.
        calibration: ids of training texts, or None.
        reference: logits float32 [N, C] of the tested texts in fp32.
    """

    name: str
    shape: Shape
    model: Path
    config: EncoderConfig
    timed: list[list[int]]
    tested: list[list[int]]
    labels: np.ndarray | None
    calibration: list[list[int]] | None
    reference: np.ndarray


@dataclass
class Row:
    """A file under measurement; ``time`` gives one round, as a case of the agent."""

    name: str
    peer: str
    facts: dict[str, Any]
    time: Callable[[], dict[str, Any]]
    rounds: list[dict[str, Any]] = field(default_factory=list)


class PeerFailed(Exception):
    """A peer could not be installed, built or run; the message is the end of what it said."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--case", action="append", choices=list(CASES), help="which to run, all by default; may be given again")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="which peers take part, all by default; may be given again")
    parser.add_argument("--model", type=Path, help="model folder fine-tuned on CLINC150; otherwise the recipe's teacher is trained, or cached")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, help="texts timed per round, instead of the case's own number; for trials")
    parser.add_argument("--rebuild", action="store_true", help="convert again what earlier runs have converted")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "peers", help="environments and converted files")
    options = parser.parse_args()
    try:
        if options.rounds < 1 or (options.texts is not None and options.texts < 1):
            raise BadInput(f"--rounds {options.rounds}, --texts {options.texts}: both must be at least 1")
        return compare(options)
    except PocketbertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def compare(options: argparse.Namespace) -> int:
    figures: dict[str, Any] = {"cases": {}}
    if options.record and RESULTS.is_file():
        figures = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = options.case or list(CASES)
    for name in names:
        figures["cases"][name] = run_case(name, options)
        figures["checks"] = checks(figures)
        if options.record:  # as they come: a run of hours that ends early leaves what it has
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(peers_table(figures))
    print()
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.3g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one case: model, environments, files, logits, rounds."""
    folder = (options.out / name).absolute()
    say(f"{name}: model and texts")
    case = prepare(name, folder, options)
    failed: list[dict[str, str]] = []
    rows = peer_rows(case, folder, options, failed)
    rows += our_rows(case, folder)
    peak_before = int8_peak()
    for round_number in range(1, options.rounds + 1):
        for row in list(rows):
            say(f"{name}: round {round_number}/{options.rounds}: {row.name}")
            try:
                row.rounds.append(row.time())
            except PeerFailed as error:
                rows.remove(row)
                failed.append({"name": row.name, "peer": row.peer, "step": "timing", "error": str(error)})
    peak = max(peak_before, int8_peak(), key=lambda found: found["gmacs_per_s"])
    conditions = LocalTarget().info()["conditions"]
    full, ours = (multiply_adds(case.config, max(map(len, case.timed)), trimmed) for trimmed in (False, True))
    return {
        "machine": {
            "cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(), "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "rounds": options.rounds, "texts": len(case.timed), "tested": len(case.tested),
        "tokens_mean": round(float(np.mean([len(ids) for ids in case.timed])), 3), "fp32_accuracy": accuracy(case, case.reference),
        "int8_peak": peak, "multiply_adds": {"tokens": max(map(len, case.timed)), "whole_model": full, "last_layer_for_cls_only": ours},
        "libraries": library_versions(), "rows": [finished(row, ours if row.peer == OURS else full, peak, case) for row in rows],
        "failed": failed,
    }  # fmt: skip


def finished(row: Row, macs: int, peak: dict[str, Any], case: Case) -> dict[str, Any]:
    """The row as it is written: samples of all rounds merged."""
    summary = latency_summary([sample for one in row.rounds for sample in one["samples_ns"]])
    latency = {key: summary[key] for key in ("count", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "min_ms")}
    share = {}
    if len(set(map(len, case.timed))) == 1:  # multiply-adds go with a length; of mixed texts there is no one share
        share = {"share_of_int8_peak": round(macs / (summary["p50_ms"] / 1e3) / (peak["gmacs_per_s"] * 1e9), 4)}
    rounds = {"round_p50_ms": [one["p50_ms"] for one in row.rounds], "warmup_stable": all(one["warmup"]["stable"] for one in row.rounds)}
    return {"case": case.name, "name": row.name, "peer": row.peer, **latency, **rounds, **share, **row.facts}


# --- models and texts ---------------------------------------------------------------------------------------------


def prepare(name: str, folder: Path, options: argparse.Namespace) -> Case:
    """The model as a folder of transformers, and the texts of the case."""
    shape, model = CASES[name], folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    timed = options.texts or shape.texts
    if name == "clinc150":
        return prepare_clinc150(shape, model, timed, options)
    random_model(name, model)
    encoder = load_encoder(model)
    draw = np.random.default_rng(0)
    texts = [[101, *draw.integers(1000, encoder.config.vocab_size, shape.buckets[-1] - 2).tolist(), 102] for _ in range(timed)]
    return Case(name, shape, model, encoder.config, texts, texts[:20], None, None, reference_logits(encoder, texts[:20]))


def prepare_clinc150(shape: Shape, model: Path, timed: int, options: argparse.Namespace) -> Case:
    from pipeline.flow.recipe import load_recipe
    from pipeline.models.tokenizer_files import TOKENIZER
    from pipeline.tasks import load_data
    from runtimes.text import TextEncoder

    recipe = load_recipe("clinc150")
    data = load_data(recipe.task, None)
    teacher = options.model or make_teacher(options.out)
    told = [label for _, label in sorted((int(k), v) for k, v in read_config(teacher).get("id2label", {}).items())]
    names = data.labels["logits"]
    if told != names:
        raise BadInput(f"--model {teacher}: its {len(told)} labels are not the {len(names)} of CLINC150; it must be fine-tuned on them")
    encoder = load_encoder(teacher)
    save_for_transformers(encoder, model)
    text_encoder = TextEncoder(teacher / TOKENIZER, recipe.task.max_length)

    def ids_of(rows: list[dict[str, Any]]) -> list[list[int]]:
        return [one.ids for one in text_encoder.encode_batch([row["text"] for row in rows], offsets=False)]

    tested = ids_of(data.test)
    order = np.random.default_rng(0).permutation(len(tested))
    drawn = np.random.default_rng(0).permutation(len(data.train))[:CALIBRATION_TEXTS]
    labels = np.asarray([names.index(row["label"]) for row in data.test])
    return Case(
        "clinc150", shape, model, encoder.config, [tested[i] for i in order[:timed]], tested, labels,
        ids_of([data.train[i] for i in drawn]), reference_logits(encoder, tested),
    )  # fmt: skip


def make_teacher(out: Path) -> Path:
    """The teacher of the clinc150 recipe: its first stage alone, from the pipeline's cache if it is there."""
    from pipeline.flow.engine import run
    from pipeline.flow.progress import Progress
    from pipeline.flow.recipe import load_recipe

    recipe, cache = load_recipe("clinc150"), Cache()
    recipe.stages = [stage for stage in recipe.stages if stage.use == "finetune"]
    record = run(recipe, out / "teacher", cache, Progress(), lambda ledger, page: None).records[0]
    return cache.artifacts(record["key"], record)["teacher"].folder


def random_model(name: str, folder: Path) -> None:
    """Random weights in the shape of a published model, the same every time, in the form transformers saves."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = {"bert-base": transformers.BertConfig, "mobilebert": transformers.MobileBertConfig}[name]
    model = transformers.AutoModelForSequenceClassification.from_config(kind(num_labels=150))
    if name == "mobilebert":
        # Without normalisation a random map either swells or dies over 24 layers. At half of 1/sqrt(inputs) the feature
        # map grows about fivefold from the first layer to the last, as that of a trained model does.
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.normal_(0.0, 0.5 / module.in_features**0.5)
            elif isinstance(module, torch.nn.Embedding):
                module.weight.data.normal_(0.0, 1.0)
    model.save_pretrained(folder)


def reference_logits(model: Encoder, texts: list[list[int]]) -> np.ndarray:
    """Logits float32 [N, C] in fp32, texts of one length together, so that none is padded."""
    import torch

    logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
    for length in sorted(set(map(len, texts))):
        rows = [i for i, ids in enumerate(texts) if len(ids) == length]
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            with torch.no_grad():
                logits[part] = model(torch.tensor([texts[i] for i in part])).logits.numpy()
    if not np.isfinite(logits).all():
        raise BadInput(f"the fp32 logits of {model.config.family} are not finite; its weights make no model to compare")
    return logits


def accuracy(case: Case, logits: np.ndarray) -> float | None:
    """% of the tested texts whose largest logit is that of their label; None without labels."""
    return None if case.labels is None else round(100 * float((logits.argmax(1) == case.labels).mean()), 3)


def quality(case: Case, logits: np.ndarray) -> dict[str, Any]:
    """How right a file's logits are: by the labels, and against fp32."""
    correlation = float(np.corrcoef(logits.ravel(), case.reference.ravel())[0, 1]) if np.isfinite(logits).all() else 0.0
    return {"accuracy": accuracy(case, logits), "fp32_correlation": round(correlation, 5)}


def pack(path: Path, texts: list[list[int]]) -> Path:
    write_inputs(path, [(ids, [0] * len(ids)) for ids in texts])
    return path


# --- our files ----------------------------------------------------------------------------------------------------


def ours(case: Case, folder: Path) -> list[tuple[str, Path, str]]:
    """Our int8 files of the case's model: (name of the row, file, format) each.

    ``static`` has the FFN matrices in fixed ranges, calibrated on training texts (on random ones for random weights).
    """
    from exporters.buckets import choose_buckets
    from exporters.calibration import calibrate
    from exporters.folding import fold
    from exporters.onnx_writer import write_onnx
    from exporters.quant_plan import INT8, INT8_STATIC, QuantPlan
    from exporters.tflite_writer import write_tflite
    from runtimes.text import Encoding

    longest = case.shape.buckets[-1]
    model = fold(load_encoder(case.model), longest)
    buckets, calibration = case.shape.buckets, case.calibration
    if calibration is None:
        draw = np.random.default_rng(1)
        calibration = [draw.integers(1000, case.config.vocab_size, longest).tolist() for _ in range(8)]
    else:
        buckets = choose_buckets([len(ids) for ids in calibration], model.multiply_adds, len(buckets) + 1, longest)
    dynamic = QuantPlan(INT8)
    ranges = calibrate(model, [Encoding(ids, [0] * len(ids)) for ids in calibration]).ranges
    static = QuantPlan(INT8, ((r"layers\.\d+\.ffns\..*", INT8_STATIC),), ranges)
    files = [(f"{OURS}_onnx", folder / "model_quantized.onnx", "onnx"), (f"{OURS}_tflite", folder / "model_int8.tflite", "tflite"),
             (f"{OURS}_tflite_static", folder / "model_int8_static.tflite", "tflite")]  # fmt: skip
    write_onnx(model, files[0][1], dynamic)
    write_tflite(model, files[1][1], buckets, dynamic)
    write_tflite(model, files[2][1], buckets, static)
    return files


def our_rows(case: Case, folder: Path) -> list[Row]:
    from runtimes.backends import load_model

    work = folder / OURS
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say(f"{case.name}: {OURS}: export")
    started = time.monotonic()
    files = ours(case, work)
    seconds = round(time.monotonic() - started, 1)
    inputs = pack(work / "timed.inputs", case.timed)
    rows = []
    for name, path, file_format in files:
        say(f"{case.name}: {name}: logits")
        model = load_model(path)
        logits = np.stack([model.run(ids)["logits"] for ids in case.tested])
        job = {
            "mode": "latency", "model": str(path), "format": file_format, "threads": 1, "cores": None, "inputs": str(inputs),
            "golden": None, "tolerance": 0.0, "cases": [{"case": "texts"}], **plan(case),
        }  # fmt: skip
        facts = {
            "settings": f"{file_format} int8", "size_bytes": path.stat().st_size, **quality(case, logits), "build_seconds": seconds,
            "versions": {OURS: library_versions()[OURS], **dict([model.runtime.split(" ", 1)])},
        }  # fmt: skip
        rows.append(Row(name, OURS, facts, lambda job=job: LocalTarget().run(job)["cases"][0]))
    return rows


def plan(case: Case) -> dict[str, Any]:
    """How a round is timed: every text once, whatever it takes, so that no row runs some texts more often than another."""
    return {"warmup": WARMUP, "min_inferences": len(case.timed), "min_seconds": 0.0}


# --- peers --------------------------------------------------------------------------------------------------------


def peer_rows(case: Case, folder: Path, options: argparse.Namespace, failed: list[dict[str, str]]) -> list[Row]:
    """A row for every variant of every peer that could be installed and converted; the others go to ``failed``."""
    inputs = {"timed": pack(folder / "timed.inputs", case.timed), "tested": pack(folder / "tested.inputs", case.tested)}
    if case.calibration is not None:
        inputs["calibration"] = pack(folder / "calibration.inputs", case.calibration)
    rows = []
    for peer in options.peer or PEERS:
        wanted = [name for name in PEERS[peer] if name in case.shape.rows]
        step, name = "environment", ", ".join(wanted)
        try:
            python = environment(peer, (options.out / "envs" / peer).absolute()) if wanted else None
        except PeerFailed as error:
            failed.append({"name": name, "peer": peer, "step": step, "error": str(error)})
            continue
        for name in wanted:
            try:
                step = "build"
                job, made = build(case, peer, python, name, folder / name, inputs, options.rebuild)
                step = "logits"
                say(f"{case.name}: {name}: logits")
                output = folder / name / "logits.npz"
                call(peer, python, "run", job | {"mode": "logits", "inputs": str(inputs["tested"]), "output": str(output)}, RUN_SECONDS)
                with np.load(output, allow_pickle=False) as arrays:
                    facts = quality(case, arrays["logits"])
            except PeerFailed as error:
                failed.append({"name": name, "peer": peer, "step": step, "error": str(error)})
                say(f"{case.name}: {name}: {step} failed: {error}")
                continue
            facts = {
                "settings": made["settings"], "size_bytes": made["size_bytes"], **facts, "build_seconds": made["seconds"],
                "versions": made["versions"],
            }  # fmt: skip
            timing = job | {"mode": "latency", "inputs": str(inputs["timed"]), **plan(case)}
            rows.append(Row(name, peer, facts, lambda peer=peer, python=python, job=timing: call(peer, python, "run", job, RUN_SECONDS)))
    return rows


def environment(peer: str, folder: Path) -> Path:
    """The Python of the peer's virtual environment, made afresh when its requirements have changed.

    Raises:
        PeerFailed: pip could not install them.
    """
    requirements, stamp, python = SCRIPTS / f"{peer}.txt", folder / "requirements.sha256", folder / "bin" / "python"
    wanted = file_sha256(requirements)
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted and python.exists():
        return python
    say(f"{peer}: environment")
    shutil.rmtree(folder, ignore_errors=True)
    run_command([sys.executable, "-m", "venv", str(folder)], BUILD_SECONDS, None)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in requirements.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    try:  # the CPU build first: the plain version drags in gigabytes of CUDA where both are offered
        run_command([*install, "--no-deps", f"{torch}+cpu"], BUILD_SECONDS, None)
    except PeerFailed:
        say(f"{peer}: no {torch}+cpu here, {torch} it is")
    run_command([*install, "--requirement", str(requirements)], BUILD_SECONDS, None)
    stamp.write_text(wanted, encoding="ascii")
    return python


def build(
    case: Case, peer: str, python: Path, name: str, folder: Path, inputs: dict[str, Path], rebuild: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert, or find what an earlier run converted from the same weights by the same script.

    Returns:
        The keys that every ``run`` job of this row has, and the answer of ``build``.
    """
    job = {
        "variant": name, "model": str(case.model), "folder": str(folder), "buckets": case.shape.buckets,
        "default_length": case.shape.default_length, "agent": str(AGENT.absolute()),
        "calibration": str(inputs["calibration"]) if "calibration" in inputs else None,
    }  # fmt: skip
    sources = [*sorted(case.model.iterdir()), SCRIPTS / "peer.py", SCRIPTS / f"{peer}.py", SCRIPTS / f"{peer}.txt"]
    if "calibration" in inputs:
        sources.append(inputs["calibration"])
    key = digest([job, [file_sha256(path) for path in sources]])
    record = folder / "build.json"
    if record.is_file() and not rebuild:
        made = json.loads(record.read_text(encoding="utf-8"))
        if made["key"] == key and all(Path(path).is_file() for path in made["files"]):
            return job | {"files": made["files"]}, made
    say(f"{case.name}: {name}: build")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = call(peer, python, "build", job, BUILD_SECONDS) | {"key": key}
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return job | {"files": made["files"]}, made


def call(peer: str, python: Path, verb: str, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of the peer's script to one job, from a fresh process."""
    with tempfile.TemporaryDirectory(prefix="pocketbert-peers-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _FIXED
        stdout = run_command([str(python), str(SCRIPTS / f"{peer}.py"), verb, str(job_file)], seconds, environment, folder)
    return json.loads(stdout)


def run_command(command: list[str], seconds: float, environment: dict[str, str] | None, folder: str | None = None) -> str:
    """Standard output of a command that succeeds.

    Raises:
        PeerFailed: with the error of the answer, or else the last of what the command said.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment, cwd=folder, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"no end within {seconds:g} s") from error
    if done.returncode == 0:
        return done.stdout
    try:
        message = json.loads(done.stdout)["error"]
    except (ValueError, KeyError, TypeError):
        message = f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}"
    raise PeerFailed(message.replace(str(ROOT), "."))  # it goes into the results, where no folder of this machine belongs


# --- the machine --------------------------------------------------------------------------------------------------


def int8_peak() -> dict[str, Any]:
    """Multiply-adds per second of a large int8 matrix product (uint8 x int8) in ONNX Runtime on one thread: the best of several sizes."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw, best = np.random.default_rng(0), {"gmacs_per_s": 0.0}
    for rows, inner, columns in ((256, 1024, 1024), (512, 2048, 2048), (1024, 4096, 4096)):
        weights = numpy_helper.from_array(draw.integers(-64, 64, (inner, columns), dtype=np.int8), "weights")  # a constant, so that it is packed
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["x", "weights"], ["y"])], "peak",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])],
            [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, columns])], [weights],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
        feeds = {"x": draw.integers(0, 128, (rows, inner), dtype=np.uint8)}
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            session.run(["y"], feeds)
            seconds.append(time.perf_counter() - started)
        rate = rows * inner * columns / min(seconds) / 1e9
        if rate > best["gmacs_per_s"]:
            best = {"gmacs_per_s": round(rate, 1), "shape": [rows, inner, columns]}
    return best


def multiply_adds(config: EncoderConfig, tokens: int, last_layer_for_cls_only: bool) -> int:
    """Multiply-adds of every matrix product for one text of ``tokens`` tokens, attention's own among them.

    Args:
        last_layer_for_cls_only: the last layer's queries, FFNs and outputs for the first token alone, as our files compute it.
    """
    n, hidden, inner = tokens, config.hidden_size, config.inner_size
    width = config.embedding_size * (3 if config.embedding_projection == "trigram" else 1)
    total = 0 if config.embedding_projection == "none" else n * width * hidden
    for position, shape in enumerate(config.layers):
        m = 1 if last_layer_for_cls_only and position == len(config.layers) - 1 else n
        heads = shape["heads"] * shape["head_size"]
        bottleneck = config.bottleneck_size is not None
        reads = config.bottleneck_attention if bottleneck else "none"
        query_key, value = (inner if reads in ("query_key", "all") else hidden), (inner if reads == "all" else hidden)
        total += m * query_key * heads + n * query_key * heads + n * value * heads  # queries, keys, values
        total += 2 * m * n * heads + m * heads * inner  # scores, their sum over the values, the output
        total += sum(2 * m * inner * size for size in shape["ffn_sizes"])
        if bottleneck:
            total += (n if reads == "all" else m) * hidden * inner + (n * hidden * inner if reads == "query_key" else 0) + m * inner * hidden
    return total + (hidden * hidden if config.pooler != "none" else 0) + hidden * config.num_labels


# --- what came out ------------------------------------------------------------------------------------------------


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure against its mark, for the cases that have run.

    The best peer is the fastest int8 row that works: within a point of fp32, or correlated with it where there are no labels.
    """
    listed: list[tuple[str, float, str, float]] = []
    cases = figures["cases"]
    for name, case in cases.items():
        rows = {row["name"]: row for row in case["rows"]}
        mine = min((row for row in case["rows"] if row["peer"] == OURS), key=lambda row: row["p50_ms"], default=None)
        peers = [row for row in case["rows"] if row["peer"] != OURS and row["name"] not in NOT_INT8 and works(row, case)]
        if mine is None or not peers:
            continue
        if name == "clinc150":
            best = min(peers, key=lambda row: row["p50_ms"])
            listed.append((f"clinc150: times faster at p50 than the best peer ({best['name']})", best["p50_ms"] / mine["p50_ms"], ">=", 1.3))
            if "litert_default" in rows:
                listed.append(("clinc150: times faster at p50 than LiteRT padded", rows["litert_default"]["p50_ms"] / mine["p50_ms"], ">=", 7.0))
            listed.append(("clinc150: points below fp32 on test", round(case["fp32_accuracy"] - mine["accuracy"], 3), "<=", 0.3))
            smallest = min(row["size_bytes"] for row in peers)
            own = min(row["size_bytes"] for row in case["rows"] if row["peer"] == OURS)
            listed.append(("clinc150: size of our smallest file over that of the smallest peer", own / smallest, "<=", 1.0))
            continue
        optimum = [row["p50_ms"] for row in peers if row["peer"] == "optimum_ort"]
        if optimum:
            mark = {"bert-base": 1.45, "mobilebert": 1.8}[name]
            listed.append((f"{name}: times faster at p50 than optimum's int8", min(optimum) / mine["p50_ms"], ">=", mark))
        listed.append((f"{name}: correlation of our fastest file's logits with fp32", mine["fp32_correlation"], ">=", 0.98))
    passed = {">=": lambda v, m: v >= m, "<=": lambda v, m: v <= m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


def works(row: dict[str, Any], case: dict[str, Any]) -> bool:
    if row["accuracy"] is not None:
        return row["accuracy"] >= case["fp32_accuracy"] - 1.0
    return row["fp32_correlation"] >= 0.9


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
