"""What caching the teacher saves: seconds of a distillation step with its outputs on disk, and with it running.

    python benchmarks/teacher_cache.py CACHE

CACHE is the cache of a finished clinc150 run, whose teacher and student are used. Both kinds of step are timed in
turns in one process; one JSON document is printed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipeline.flow.cache import Cache
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.learning.teacher import collect
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inference import half_precision
from pipeline.tasks import load_data
from pipeline.tasks.base import Task
from pipeline.tasks.batches import EncodedTexts, make_batch, shuffled_rows

ROUNDS, STEPS = 5, 40
BATCH = 128  # the recipe's


def main() -> int:
    cache = Cache(Path(sys.argv[1]))
    folders = {entry["stage"]: cache.root / "stages" / entry["key"] for entry in cache.entries()}
    teacher = Checkpoint.load(folders["prune-vocab"] / "model")
    student = Checkpoint.load(folders["distill-mobilebert"] / "model").model.train()
    task = load_recipe("clinc150").task
    data = load_data(task, None)
    texts = task.encode(teacher.tokenizer, data.train, data, teacher.model.config.pad_token_id)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        outputs = collect(teacher.model, texts, Path(name) / "cache", Progress(quiet=True))
        collect_seconds = time.monotonic() - started

        @torch.no_grad()
        def running(batch):
            with half_precision():
                return teacher.model.outputs(batch)

        seconds: dict[str, list[float]] = {"cached": [], "running": []}
        for turn in range(ROUNDS):
            batches = shuffled_rows(texts, BATCH, 0, turn)[:STEPS]
            for kind, expected in (("cached", outputs.outputs), ("running", running)):
                seconds[kind].append(timed(task, student, optimizer, texts, batches, expected))
    cached_seconds, running_seconds = (statistics.median(seconds[kind]) for kind in ("cached", "running"))
    steps = len(texts) / BATCH / STEPS
    print(json.dumps({
        "cached_epoch_seconds": round(cached_seconds * steps, 2), "running_epoch_seconds": round(running_seconds * steps, 2),
        "ratio": round(cached_seconds / running_seconds, 3), "collect_once_seconds": round(collect_seconds, 2), "threads": torch.get_num_threads(),
    }))  # fmt: skip
    return 0


def timed(task: Task, student, optimizer, texts: EncodedTexts, batches, expected) -> float:
    """Seconds of one training step per batch."""
    started = time.monotonic()
    for rows in batches:
        batch = make_batch(texts, rows)
        wanted = expected(batch)
        with half_precision():
            loss = task.soft_loss(student.outputs(batch), wanted, batch, 2.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
