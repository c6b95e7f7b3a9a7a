"""TFLite's official ``benchmark_model`` as a second engine on a phone: run it per signature, read its log.

The binary is the user's (TensorFlow Lite's or LiteRT's). It fills the inputs with random numbers and cannot compare outputs, so
the project's own runner proves the file with its golden cases first. Its logs have said the same since 2019, in changing words:
how long the session took to initialize, two lines of statistics in microseconds (warm-up, inferences; newer ones with
percentiles), a summary, and, but for the oldest, what memory grew by.

What this does not do: run real texts; repeat in rounds; use a GPU or an NPU; download the binary; read profiles of operators.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_bench.agent.agent import read_inputs
from device_bench.targets.adb import AdbTarget
from device_bench.tflite_signatures import Signature, read_signatures
from runtimes.errors import BadInput, TargetUnreachable

ENGINE = "benchmark_model"
SIGNATURE_PREFIX = "serving_"
WARMUP_RUNS = 16
RUNS = 128
MIN_SECONDS = 1.0
_FIXED_RANGES = {"attention_mask": (1, 1), "token_type_ids": (0, 0)}
_QUOTED_CHARACTERS = 400

_SESSION = re.compile(r"Initialized session in ([\d.]+) ?ms")
# A level is all that may stand before it: with profiling on, other lines hold such statistics too.
_STATISTICS = re.compile(r"^(?:INFO: )?count=(\d+)(.*)$", flags=re.MULTILINE)
_SUMMARY = re.compile(r"Inference timings in us: Init: |Average inference timings in us: |=+ BENCHMARK RESULTS =+")
_FOOTPRINT = re.compile(r"(?:Memory footprint delta from the start of the tool|Peak memory footprint) \(MB\): init=([\d.e+-]+) overall=([\d.e+-]+)")
_PEAK = re.compile(r"(?:Overall peak memory footprint \(MB\) via periodic monitoring|Peak memory): +([\d.e+-]+)")
_LITERT_FOOTPRINT = (re.compile(r"Init footprint: +([\d.]+) MB"), re.compile(r"Overall footprint: +([\d.]+) MB"))
_SIGNATURE = re.compile(r"(?:Signature to run: \[|Using signature: )([^\]\s]*)")
_IGNORED = re.compile(r"Unconsumed cmdline flags: *(.*)")
_STATISTICS_NAMES = {
    "first": "first_ms", "avg": "mean_ms", "min": "min_ms", "max": "max_ms", "std": "std_ms", "p5": "p5_ms", "median": "p50_ms", "p95": "p95_ms",
}  # fmt: skip
_COMPLAINT = re.compile(r"^(?:ERROR|FATAL|F\d*): ?.*$", flags=re.MULTILINE)


def measure_signatures(
    target: AdbTarget,
    binary: Path,
    job: dict[str, Any],
    lengths: Sequence[int] = (),
    xnnpack: bool | None = None,
    warmup_runs: int = WARMUP_RUNS,
    runs: int = RUNS,
    min_seconds: float = MIN_SECONDS,
) -> list[dict[str, Any]]:
    """Prove the file with the project's runner, then time its signatures with the binary, each in a process of its own.

    Args:
        job: model, format ("tflite"), threads, cores, inputs (their largest id bounds the random ones), golden and tolerance,
            as the agents have them; its other keys are not read.
        lengths: the signatures that would serve inputs of so many tokens; all signatures if empty.
        xnnpack: switch its delegate on or off; None leaves it to the binary.
        warmup_runs, runs, min_seconds: what the binary does at least; ``count`` in the answer says what it did.

    Returns:
        One dict per signature, with: engine, target, threads, case ("length"), length (tokens), golden ("c runner" if it was
        checked, by the runner and with its own runtime; None if the job has none), inputs ("in range": ids up to that of the
        job's under a full mask; "any": what the binary likes), init_ms, first_inference_ms, warmup {count, mean_ms, ...},
        count, mean_ms, min_ms, max_ms, std_ms, p5_ms, p50_ms, p95_ms (None where it does not print them), memory
        {init_bytes, overall_bytes, peak_bytes: growth since the tool's start; from a process of its own; None where it does not
        print them}, conditions.

    Raises:
        BadInput: not a TFLite file with such signatures, a binary that is not for this phone, or one too old to choose signatures.
        IntegrityError: the golden outputs are wrong.
        TargetUnreachable: as in :meth:`Target.run`; the binary failed, or prints nothing that can be read.
    """
    if job["format"] != "tflite":
        raise BadInput(f"{job['model']}: benchmark_model runs TFLite files only")
    signatures = _choose(Path(job["model"]), lengths)
    target.check_program(binary)
    conditions, golden = _prove(target, job)
    there = [*_pinned(job.get("cores"), conditions), target.push(binary), f"--graph={target.push(Path(job['model']))}"]
    there += [f"--num_threads={job['threads']}", *([] if xnnpack is None else [f"--use_xnnpack={str(xnnpack).lower()}"])]
    largest_id = _largest_id(Path(job["inputs"]))
    rows = []
    for signature in signatures:
        arguments = [*there, f"--signature_to_run_for={signature.key}", *_input_options(signature, largest_id)]
        timing = [f"--warmup_runs={warmup_runs}", f"--num_runs={runs}", f"--min_secs={min_seconds:g}"]
        timed = _run(target, [*arguments, *timing], signature)
        # Watching the peak takes a thread of its own, which would disturb what is timed.
        once = ["--warmup_runs=1", "--num_runs=1", "--warmup_min_secs=0.001", "--min_secs=0.001", "--report_peak_memory_footprint=true"]
        footprint = _run(target, [*arguments, *once], signature)
        rows.append({
            "engine": ENGINE, "target": target.name, "threads": job["threads"], "case": "length", "length": _length(signature), "golden": golden,
            "inputs": "any" if "--input_layer_value_range" in timed["ignored_flags"] else "in range", "init_ms": timed["init_ms"],
            "first_inference_ms": timed["first_inference_ms"], "warmup": timed["warmup"], **timed["inference"], "memory": footprint["memory"],
            "conditions": conditions,
        })  # fmt: skip
    return rows


def parse_log(text: str) -> dict[str, Any]:
    """What a run of the binary says: init_ms, first_inference_ms, warmup and inference (statistics, see :func:`measure_signatures`),
    memory, signature (None if it does not say which it ran), ignored_flags (names of options that it does not know).

    Raises:
        ValueError: the log holds no finished run.
    """
    text = text.replace("\r\n", "\n")
    session, found = _SESSION.search(text), _STATISTICS.findall(text)
    if session is None or not found or _SUMMARY.search(text) is None:
        raise ValueError("no finished run in the log")
    first, last = (_statistics(int(count), rest) for count, rest in (found[0], found[-1]))
    signature, ignored = _SIGNATURE.search(text), _IGNORED.search(text)
    return {
        "init_ms": float(session[1]),
        "first_inference_ms": first["first_ms"],
        "warmup": {key: value for key, value in first.items() if key != "first_ms"} if len(found) > 1 else None,
        "inference": {key: value for key, value in last.items() if key != "first_ms"},
        "memory": _memory(text),
        "signature": signature[1] or None if signature else None,
        "ignored_flags": sorted(set(re.findall(r"--\w+", ignored[1]))) if ignored else [],
    }


def _statistics(count: int, rest: str) -> dict[str, Any]:
    """One line in microseconds. Equal samples are printed as ``curr`` alone; no samples as nothing."""
    values = {key: float(value) / 1000 for key, value in re.findall(r"(\w+)=([\d.e+-]+)", rest)}
    if "avg" not in values and "curr" in values:
        values |= dict.fromkeys(("first", "avg", "min", "max"), values["curr"]) | {"std": 0.0}
    return {"count": count, **{name: round(values[key], 6) if key in values else None for key, name in _STATISTICS_NAMES.items()}}


def _memory(text: str) -> dict[str, int | None]:
    both, peak = _FOOTPRINT.search(text), _PEAK.search(text)
    init, overall = (both[1], both[2]) if both else (match[1] if match else None for match in (pattern.search(text) for pattern in _LITERT_FOOTPRINT))
    return {"init_bytes": _bytes(init), "overall_bytes": _bytes(overall), "peak_bytes": _bytes(peak[1] if peak else None)}


def _bytes(megabytes: str | None) -> int | None:
    return None if megabytes is None else round(float(megabytes) * 1024 * 1024)


# --- the run --------------------------------------------------------------------------------------------------------


def _run(target: AdbTarget, arguments: list[str], signature: Signature) -> dict[str, Any]:
    done = target.execute(arguments, target.deadline_s)
    text = f"{done.stdout}\n{done.stderr}"
    complaints = " ".join(_COMPLAINT.findall(text))[:_QUOTED_CHARACTERS] or text.strip()[-_QUOTED_CHARACTERS:]
    if done.exit_code != 0:
        raise TargetUnreachable(f"{target.name}: benchmark_model ended with {done.exit_code}: {complaints!r}")
    try:
        parsed = parse_log(text)
    except ValueError as error:
        raise TargetUnreachable(f"{target.name}: {error} that benchmark_model printed: {complaints!r}; is it TFLite's?") from error
    # A binary without that option runs the first subgraph whatever it is told; only newer ones say what they ran.
    told = parsed["signature"] == signature.key or ("--signature_to_run_for" not in parsed["ignored_flags"] and "BENCHMARK RESULTS" in text)
    if not told and signature.subgraph != 0:
        newer = "take a newer one, such as LiteRT's"
        raise BadInput(f"{target.name}: this benchmark_model cannot run {signature.key}, only the file's first signature; {newer}")
    return parsed


def _prove(target: AdbTarget, job: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(conditions of the phone, who checked the golden cases)"""
    if job["golden"] is None:
        return target.info()["conditions"], None
    kept = {key: job[key] for key in ("model", "format", "threads", "cores", "golden", "tolerance", "session") if key in job}
    with tempfile.TemporaryDirectory(prefix="pocketbert-bench-") as folder:
        answer = target.run({**kept, "mode": "outputs", "inputs": job["golden"], "output": str(Path(folder) / "outputs")})
    return answer["conditions"], "c runner"


def _choose(model: Path, lengths: Sequence[int]) -> list[Signature]:
    signatures = sorted((one for one in read_signatures(model) if _length(one)), key=_length)
    if not signatures:
        raise BadInput(f"{model}: has no signatures {SIGNATURE_PREFIX}N; benchmark_model is run for files of this project")
    if not lengths:
        return signatures
    longest = _length(signatures[-1])
    if max(lengths) > longest:
        raise BadInput(f"lengths: {max(lengths)} tokens are more than {model.name} takes ({longest})")
    return list(dict.fromkeys(next(one for one in signatures if _length(one) >= length) for length in lengths))


def _length(signature: Signature) -> int:
    """Tokens, 0 for a signature that is not named after its length."""
    number = signature.key.removeprefix(SIGNATURE_PREFIX)
    return int(number) if signature.key != number and number.isdecimal() else 0


def _input_options(signature: Signature, largest_id: int) -> list[str]:
    """Names, shapes and ranges in the order of the subgraph, by which the binary takes them. It only compares the names."""
    names = [one.tensor if not re.search(r"[:,]", one.tensor) else one.name for one in signature.inputs]
    ranges = [_FIXED_RANGES.get(one.name, (0, largest_id)) for one in signature.inputs]
    shapes = [",".join(map(str, one.shape)) for one in signature.inputs]
    return [
        f"--input_layer={','.join(names)}", f"--input_layer_shape={':'.join(shapes)}",
        f"--input_layer_value_range={':'.join(f'{name},{low},{high}' for name, (low, high) in zip(names, ranges, strict=True))}",
    ]  # fmt: skip


def _largest_id(file: Path) -> int:
    inputs, _ = read_inputs(str(file))
    return max(int(ids.max()) for ids, _ in inputs)


def _pinned(cores: Sequence[int] | str | None, conditions: dict[str, Any]) -> list[str]:
    """``taskset`` with a mask, for cores by number or by kind."""
    if cores in ("big", "little"):
        clusters = conditions.get("clusters") or []
        if len(clusters) < 2:
            raise BadInput(f"cores {cores!r}: all cores are alike here, or the phone does not say which those are; leave cores out")
        cores = clusters[-1 if cores == "big" else 0]["cores"]
    return [] if cores is None else ["taskset", f"{sum(1 << core for core in cores):x}"]
