"""Write the figures of ``results/`` into the README, between its markers; a test holds that they are there unchanged.

    python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
SHOWN = ("teacher", "TFLite int8", "ONNX int8", "TFLite fp32", "ONNX fp32")
TITLES = {"teacher": "teacher (MiniLM-L6, fine-tuned), ONNX Runtime fp32"}


def clinc150_table(figures: dict[str, Any]) -> str:
    """The CLINC150 run as a Markdown table with a line on its conditions."""
    rows = {row["name"]: row for row in figures["rows"]}
    teacher = rows["teacher"]
    lines = ["| file | size, MB | test accuracy, % | against teacher | p50 per text, ms | faster |", "|---|--:|--:|--:|--:|--:|"]
    for name in SHOWN:
        row = rows[name]
        drop = "" if row is teacher else f"{row['test'] - teacher['test']:+.2f}"
        faster = "1x" if row is teacher else f"{row['speedup']:.1f}x"
        size = f"{row['size_bytes'] / 1e6:.1f}"
        lines.append(f"| {TITLES.get(name, 'student, ' + name)} | {size} | {row['test']:.2f} | {drop} | {row['p50_ms']:.3f} | {faster} |")
    run, machine = figures["run"], figures["machine"]
    lines += [
        "",
        f"One run, one thread, real test texts, on {machine['cpu']} ({machine['cores']} cores): {run['empty_cache_seconds'] / 60:.0f} minutes "
        f"from an empty cache, {run['cached_seconds']:.0f} seconds when everything is cached. Written by `make bench` to `results/clinc150.json`.",
    ]
    return "\n".join(lines)


TOLD_STUDENT = {"clinc150 recipe": "", "given": " (with `--student`: a student that an earlier state of the recipe made)"}


def files_table(figures: dict[str, Any]) -> str:
    """Plain conversion and ours of the same student, and what the gates did."""
    rows = {row["name"]: row for row in figures["files"]}
    plain = {kind: rows[f"plain {kind} int8"]["p50_ms"] for kind in ("ONNX", "TFLite")}
    lines = [
        "| file of the CLINC150 student | size, MB | test accuracy, % | p50 per text, ms | against plain int8 | memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        faster = plain["ONNX" if "ONNX" in name else "TFLite"] / row["p50_ms"]
        size, memory = row["size_bytes"] / 1e6, row["memory_bytes"] / 1e6
        lines.append(f"| {name} | {size:.2f} | {row['test']:.2f} | {row['p50_ms']:.3f} | {faster:.2f}x | {memory:.0f} |")
    static, fallback, machine = figures["static"], figures["fallback"], figures["machine"]
    told = [
        f"Static int8 of it by onnxruntime's quantizer, calibrated on {static['calibration_texts']} texts padded as data loaders pad them: "
        f"{static['float32_test']:.2f} % becomes **{static['plain_padded_test']:.2f} %** ({static['plain_unpadded_test']:.2f} % without padding). "
        f"Ours from the same texts: **{static['ours_onnx_test']:.2f} %** in ONNX, **{static['ours_tflite_test']:.2f} %** in TFLite.",
    ]
    for kind, title in (("onnx", "ONNX"), ("tflite", "TFLite")):
        case = fallback[kind]
        if "kept" in case:
            kept = ", ".join(f"`{one['name']}`" for one in case["kept"]) or "nothing"
            told.append(
                f"An outlier planted in the student ({title}): plain dynamic int8 {case['first_validation']:.2f} % of the validation texts; the gate "
                f"kept {kept} in float32 within {case['seconds']:.0f} s: {case['validation']:.2f} %."
            )
    told.append(
        f"{figures['rounds']} interleaved rounds of {figures['texts']} real test texts, one thread, {machine['cpu']} ({machine['cores']} cores). "
        f"Written by `make bench-files` to `results/files.json`{TOLD_STUDENT[figures['student']]}."
    )
    return "\n".join([*lines, "", *told])


def peers_table(figures: dict[str, Any]) -> str:
    """Every case as a Markdown table, fastest row first, with every peer's version, and a line on its conditions."""
    parts = []
    for name, case in figures["cases"].items():
        own = min((row["p50_ms"] for row in case["rows"] if row["peer"] == "pocketbert"), default=None)
        header = "| file | of | size, MB | accuracy, % | p50, ms | p90 | p99 | times our best |"
        lines = [f"**{name}**", "", header, "|---|---|--:|--:|--:|--:|--:|--:|"]
        for row in sorted(case["rows"], key=lambda row: row["p50_ms"]):
            shown = {k: v for k, v in row["versions"].items() if k not in ("transformers", "torch") or row["peer"] == "torch_eager"}
            versions = ", ".join(f"{package} {number}" for package, number in shown.items())
            right = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
            times = "" if own is None else f"{row['p50_ms'] / own:.2f}"
            label = f"{row['name']}: {row['settings']}"
            latency = f"{row['p50_ms']:.3f} | {row['p90_ms']:.3f} | {row['p99_ms']:.3f}"
            lines.append(f"| {label} | {versions} | {row['size_bytes'] / 1e6:.1f} | {right} | {latency} | {times} |")
        machine, peak = case["machine"], case["int8_peak"]
        kind = "real test texts" if case["fp32_accuracy"] is not None else "texts, random weights"
        lines += ["", (
            f"{case['rounds']} interleaved rounds of {case['texts']} {kind} of {case['tokens_mean']:.4g} tokens on average, one thread, "
            f"{machine['cpu']} ({machine['cores']} cores); its int8 peak, measured: {peak['gmacs_per_s']:.0f} GMAC/s."
        )]  # fmt: skip
        shares = {row["name"]: row["share_of_int8_peak"] for row in case["rows"] if row["peer"] == "pocketbert" and "share_of_int8_peak" in row}
        if shares:
            macs = case["multiply_adds"]
            told = ", ".join(f"{row} {100 * share:.0f} %" for row, share in shares.items())
            lines[-1] += (
                f" Our files make {macs['last_layer_for_cls_only'] / 1e9:.2f} of the model's {macs['whole_model'] / 1e9:.2f} "
                f"GMAC; share of the peak: {told}."
            )
        if case["fp32_accuracy"] is not None:
            lines[-1] += f" fp32: {case['fp32_accuracy']:.2f} %."
        lines += [f"Failed: {one['name']} ({one['step']}): {' '.join(one['error'].split())[:200]}" for one in case["failed"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def methods_table(figures: dict[str, Any]) -> str:
    """Every operating point beside the unpruned model, and which widths the kernels like."""
    rows = figures["rows"]
    base = rows[0]
    lines = [
        "| operating point | parameters, M | TFLite int8, MB | zstd -19, MB | test accuracy, % (TFLite, ONNX) | TFLite p50, ms | faster "
        "| ONNX p50, ms | faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        tflite, onnx = row["tflite"], row["onnx"]
        lines.append(
            f"| {row['name']} | {row['unique_params'] / 1e6:.1f} | {tflite['size_bytes'] / 1e6:.2f} | {tflite['download_bytes'] / 1e6:.2f} | "
            f"{tflite['test']:.2f}, {onnx['test']:.2f} | {tflite['p50_ms']:.3f} | {base['tflite']['p50_ms'] / tflite['p50_ms']:.2f}x | "
            f"{onnx['p50_ms']:.3f} | {base['onnx']['p50_ms'] / onnx['p50_ms']:.2f}x |"
        )
    machine = figures["machine"]
    lines += ["", (
        f"MiniLM (22.8 M parameters, 11.7 M of them in the word table, which these methods leave alone) on CLINC150; int8 files in "
        f"their own runtimes; {figures['rounds']} interleaved rounds of {figures['texts']} real test texts, one thread, "
        f"{machine['cpu']} ({machine['cores']} cores); one seed. Written by `make bench-methods` to `results/methods.json`, with every option."
    )]  # fmt: skip
    lines += ["", widths_sentence(figures["widths"])]
    return "\n".join([*lines, *missed_marks(figures["checks"])])


def tasks_table(figures: dict[str, Any]) -> str:
    """Each preset: floor, teacher, the teacher's own weights in int8, and what the preset makes, all on test rows."""
    lines = [
        "| preset | metric on test | floor | teacher | same weights, int8 (ONNX, TFLite) | compressed, int8 (ONNX, TFLite) | size, MB | p50, ms "
        "| faster |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    told, missed = [], []
    for name, preset in figures["presets"].items():
        metric = preset["task"]["metrics"][0]
        key = metric["name"]
        floor = None if preset["floor"] is None else preset["floor"]["metrics"]["test"].get(key)
        same, small = ([preset[kind][f"{one} int8"] for one in ("ONNX", "TFLite")] for kind in ("same_weights", "compressed"))
        values = [", ".join(f"{one['metrics']['test'][key]:.2f}" for one in both) for both in (same, small)]
        columns = (("size_bytes", 1e6, 1), ("p50_ms", 1, 3), ("speedup", 1, 1))
        shown = [", ".join(f"{one[column] / divisor:.{digits}f}" for one in small) for column, divisor, digits in columns]
        teacher = f"{preset['teacher']['metrics']['test'][key]:.2f}"
        title = f"{metric['title']} {metric['unit']}".rstrip()
        cells = [f"`{name}`", title, "" if floor is None else f"{floor:.2f}", teacher, *values, *shown]
        lines.append(f"| {' | '.join(cells)} |")
        told.append(f"{name} {preset['minutes']:.0f}")
        missed += [{**check, "what": f"{name}: {check['what']}"} for check in preset["checks"]]
    lines += ["", (
        f"Teacher: all-MiniLM-L6-v2 fine-tuned on the task; p50 per real test input, one thread; faster than the teacher in ONNX Runtime fp32. "
        f"Minutes from an empty cache: {', '.join(told)}. Written by `make bench-tasks` to `results/tasks.json`."
    )]  # fmt: skip
    return "\n".join([*lines, *missed_marks(missed)])


def missed_marks(checks: list[dict[str, Any]]) -> list[str]:
    """A paragraph with the marks that were missed; none if all hold."""
    missed = [f"{one['what']} is {one['value']:.3g} ({one['bound']} {one['mark']:g})" for one in checks if not one["ok"]]
    return ["", f"Marks that were missed: {'; '.join(missed)}."] if missed else []


def widths_sentence(widths: list[dict[str, Any]]) -> str:
    """What FFN widths cost above the line through those that are multiples of 16."""
    parts = []
    for format_, name in (("tflite", "TFLite"), ("onnx", "ONNX")):
        line = np.poly1d(np.polyfit(*zip(*((w["width"], w[format_]) for w in widths if w["width"] % 16 == 0), strict=True), 1))
        above = {
            kind: 100 * float(np.mean([w[format_] / line(w["width"]) - 1 for w in widths if w["width"] % 16 and (w["width"] % 8 == 0) == eight]))
            for kind, eight in (("multiples of 8", True), ("odd ones", False))
        }
        parts.append(f"{name} {above['multiples of 8']:+.1f} % for other multiples of 8, {above['odd ones']:+.1f} % for odd ones")
    return f"FFN widths between {widths[0]['width']} and {widths[-1]['width']} against the line through multiples of 16: {'; '.join(parts)}."


def boards_table(figures: dict[str, Any]) -> str:
    """Every file on every emulated processor, and how long the virtual board took."""
    lines = [
        "| emulated processor | file | worst difference of a logit | same answers | accuracy there, % | here, % | M instructions per text |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for target in figures["emulated"]["targets"]:
        counts = {row["file"]: row["total_per_text"] for row in target["instructions"]}
        for row in target["agreement"]:
            worst = "same bits" if row["same_bits"] else f"{row['worst_difference']:.2g}"
            if "decisions" in row:
                same, there, here = f"{row['same_decisions']} of {row['decisions']}", row["scores"]["accuracy"], row["scores_here"]["accuracy"]
            else:  # recorded before bench documents of format 2
                same, there, here = f"{row['same_answers']} of {row['texts']}", row["accuracy_percent"], row["accuracy_here_percent"]
            instructions = counts[row["file"]] / 1e6
            lines.append(f"| {target['name']} | {row['file']} | {worst} | {same} | {there:.1f} | {here:.1f} | {instructions:.1f} |")
    seconds = figures["virtual_machine"]["seconds"]
    parts = ", ".join(f"{step.replace('_', ' ')} {taken:.0f}" for step, taken in seconds.items() if step != "all")
    lines += ["", (
        f"Real CLINC150 texts; instructions of the median text, which are no time. A virtual arm64 board made from nothing proved two files "
        f"over SSH and ADB in {seconds['all']:.0f} seconds ({parts}). Written by `make bench-boards` to `results/boards.json`."
    )]  # fmt: skip
    return "\n".join([*lines, *missed_marks(figures["checks"])])


def runner_table(figures: dict[str, Any]) -> str:
    """The runner against a loop in C, file by file."""
    lines = [
        "| file | C loop, ms | our runner | Python agent | runner against loop | own memory of the runner, MB | of the agent |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["files"]:
        ms, own = row["latency_ms"], row["own_memory_mb"]
        lines.append(
            f"| {row['file']} | {ms['loop']:.4f} | {ms['runner']:.4f} | {ms['agent']:.4f} | {row['runner_ratio']:.3f}x | {own['runner']:.1f} | "
            f"{own['agent']:.1f} |"
        )
    lines += ["", (
        f"Median of {figures['rounds']} interleaved rounds, one text, one thread, {figures['machine']['cpu']}. Own memory is on top of the runtime "
        f"in a bare loop of the same language. The runner has {figures['runner_bytes'] / 1e3:.0f} kB. Written by `make bench-runner` to "
        f"`results/runner.json`."
    )]  # fmt: skip
    return "\n".join([*lines, *missed_marks(figures["checks"])])


def comparison_sentence(figures: dict[str, Any]) -> str:
    """How often a comparison was right."""
    same, planted = figures["same"], figures["planted"]
    told = (
        f"Of {same['of']} comparisons of a file with itself, {same['right']} said *no difference seen*; of "
        f"{planted['of']} with an agent that really takes a tenth longer, {planted['right']} said *slower* (tier {figures['tier']}, "
        f"{figures['texts']} texts, {figures['file']}, {figures['machine']['cpu']}). Written by `make bench-comparison` to `results/comparison.json`."
    )
    return "\n".join([told, *missed_marks(figures["checks"])])


def insert(text: str, marker: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- marker -->`` and ``<!-- end -->``."""
    pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?<!-- end -->", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no place marked {marker}")
    body = content + "\n" if content else ""
    return pattern.sub(lambda found: f"{found.group(1)}{body}<!-- end -->", text)


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """The README ``text`` with the tables of all committed results."""
    for name, table in TABLES.items():
        path = ROOT / "results" / name
        content = table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ""
        text = insert(text, f"results/{name}", content)
    return text


TABLES = {
    "clinc150.json": clinc150_table, "files.json": files_table, "methods.json": methods_table, "peers.json": peers_table,
    "tasks.json": tasks_table, "boards.json": boards_table, "runner.json": runner_table, "comparison.json": comparison_sentence,
}  # fmt: skip
"""A file in ``results/`` -> the table that the README shows of it."""


if __name__ == "__main__":
    sys.exit(main())
