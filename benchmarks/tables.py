"""Write the figures of ``results/`` into the README, between its markers; a test holds that they are there unchanged.

    python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

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


def insert(text: str, marker: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- marker -->`` and ``<!-- end -->``."""
    pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?<!-- end -->", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no place marked {marker}")
    body = content + "\n" if content else ""
    return pattern.sub(lambda found: f"{found.group(1)}{body}<!-- end -->", text)


def main() -> int:
    readme = ROOT / "README.md"
    figures = json.loads((ROOT / "results" / "clinc150.json").read_text(encoding="utf-8"))
    readme.write_text(insert(readme.read_text(encoding="utf-8"), "results/clinc150.json", clinc150_table(figures)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
