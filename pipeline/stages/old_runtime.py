"""Run a TFLite file on tflite-runtime 2.14, the runtime of old devices, before it ships.

That runtime needs numpy 1, so it lives in an environment of its own: ``old-runtime`` inside the environment of pocketbert
(``make setup`` makes it), or wherever ``POCKETBERT_OLD_PYTHON`` points.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget
from exporters.golden import golden_tolerance
from pipeline.flow.stage import Context
from pipeline.stages.file_evaluation import encode_for_files, encodings, file_outputs
from runtimes.errors import BadInput, GateFailed, IntegrityError

VERSION = "tflite-runtime 2.14"
GOLDEN_TEXTS = 128


def old_python() -> Path:
    """The interpreter that has the old runtime.

    Raises:
        BadInput: there is none.
    """
    python = Path(os.environ.get("POCKETBERT_OLD_PYTHON") or Path(sys.prefix) / "old-runtime" / "bin" / "python")
    if not python.is_file():
        raise BadInput(
            f"quantize.old_runtimes: no interpreter with {VERSION} at {python}. Make one: python3.11 -m venv {python.parents[1]} && "
            f"{python.with_name('pip')} install tflite-runtime==2.14.0 'numpy<2'; or let POCKETBERT_OLD_PYTHON name one"
        )
    return python


def check_on_old_runtime(context: Context, path: Path, folder: Path) -> None:
    """Compare the file's results there with those of today's runtime here, on validation inputs; ``folder`` has the tokenizer.

    Raises:
        BadInput: no old runtime.
        GateFailed: it gives other results there.
    """
    texts = encode_for_files(context, folder, "validation")
    inputs = encodings(texts, range(min(GOLDEN_TEXTS, len(texts))))
    expected = file_outputs(path, inputs)
    largest = max(float(np.abs(value).max()) for outputs in expected for value in outputs.values())
    tolerance = golden_tolerance(path.name, largest)
    candidate = Candidate(path.name, path, "tflite", "", inputs, expected, tolerance)
    target = LocalTarget("old runtime", python=str(old_python()))
    try:
        answer = measure([candidate], target, [1], [], rounds=1, min_seconds=0.01, say=context.progress.say, memory=False)[0]
    except IntegrityError as error:
        raise GateFailed(f"{path.name}: {VERSION} does not compute it: {error}") from error
    if VERSION not in answer["runtime"]:
        raise BadInput(f"quantize.old_runtimes: {old_python()} runs {answer['runtime']}, {VERSION} is needed")
    context.note(f"{path.name}: {len(inputs)} inputs right on {answer['runtime']} (tolerance {tolerance:.2g})")
