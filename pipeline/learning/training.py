"""The one training loop. A method supplies the loss, the parameter groups and, if it needs one, a learning-rate rule.

Same seed, same threads, on a CPU: same bytes. A run that is killed goes on from its last checkpoint and ends with the bytes of
one that was not: batch order is a function of (seed, epoch), the generator's state is part of the checkpoint, and
checkpoints only look, they never touch. On a GPU the order of batches is the same, but some of its sums have no fixed order (atomic
additions), so the last bits of two runs may differ.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. On a CPU with bfloat16 instructions, matrices are multiplied in
bfloat16 while weights, sums and optimizer state stay in float32.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.flow import processes
from pipeline.flow.progress import Progress
from pipeline.flow.train_section import TrainSection
from pipeline.models.device import choose
from pipeline.models.encoder import Encoder
from pipeline.models.inference import half_precision
from pipeline.tasks.batches import Batch, EncodedTexts, batches_per_epoch, make_batch, shuffled_rows
from runtimes.errors import GateFailed

CHECKPOINT_SECONDS = 20.0
"""Seconds between two checkpoints, at least."""
CHECKPOINT_SHARE = 0.02
"""Share of the time that checkpoints may take: large ones are written less often."""
WRITTEN_PER_SECOND = 200e6
"""Bytes of a checkpoint per second, until one has been timed."""

ON_CPU = TrainSection(device="cpu")

Loss = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, float]]]
"""(module, batch, step) -> the loss, and its parts by name for the record."""
RateRule = Callable[[int, str], float]
"""(step, group name) -> factor on that group's learning rate."""


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    ``rate_rule`` multiplies the schedule per parameter group; the default schedule is a linear warm-up over
    ``warmup_fraction`` of the steps and a linear decay to zero.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    seed: int
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: str = "auto"
    rate_rule: RateRule | None = None
    machine: TrainSection = ON_CPU
    """How the training fits the machine. Losses that hold a model in a state of their own (gates) cannot compute it again later, nor
    follow it to a GPU: they keep the default."""


@dataclass
class TrainingJob:
    """One call of :func:`train`: the module, the data, the loss and where checkpoints go.

    ``module`` holds every trained tensor, the model's and helpers' (projections) alike. ``groups`` names the
    parameter groups; without it, all parameters form one group called ``all``.
    """

    module: nn.Module
    texts: EncodedTexts
    loss: Loss
    plan: TrainingPlan
    checkpoint: Path
    progress: Progress
    title: str
    groups: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    after_step: Callable[[int, torch.optim.Optimizer], None] | None = None
    """Called after each step with the number of steps done and the optimizer, to read from; may change ``module`` in place.
    What it remembers must lie in buffers of ``module``, or a killed run ends otherwise than one that was not."""


class _Objective(nn.Module):
    """A module and its loss as one module, because what several processes share must be called as one."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.loss(self.module, batch, step)


def train(job: TrainingJob) -> list[dict[str, float]]:
    """Train ``job.module`` in place.

    Returns:
        One record per epoch: step, loss and what the loss function reported, averaged.

    Raises:
        GateFailed: the loss is no longer a finite number. The last good checkpoint stays.
        BadInput: a device is asked for that is not there.
    """
    device = choose(job.plan.machine.device, processes.count())
    encoders = [part for part in job.module.modules() if isinstance(part, Encoder)]
    try:
        job.module.to(device)
        for encoder in encoders:
            encoder.micro_batch, encoder.activation_checkpointing = job.plan.machine.micro_batch, job.plan.machine.activation_checkpointing
        return _train(job, device)
    finally:
        job.module.to("cpu")  # what comes after training, surgery and files, is at home there
        for encoder in encoders:
            encoder.micro_batch, encoder.activation_checkpointing = None, False


def _train(job: TrainingJob, device: torch.device) -> list[dict[str, float]]:
    plan, module = job.plan, job.module
    # A method may leave parts out of a step (layers that are dropped, those that learn later), which processes must tell each other.
    # Its state is one for all stages of a run, and some train on the CPU beside a GPU, so it joins processes and we place tensors.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, device_placement=device.type == "cpu", kwargs_handlers=[unused])
    groups = job.groups or {"all": [p for p in module.parameters() if p.requires_grad]}
    optimizer = torch.optim.AdamW(_decayed(groups, plan.weight_decay), lr=plan.learning_rate, fused=device.type != "mps")
    objective, optimizer = accelerator.prepare(_Objective(module, job.loss), optimizer)
    per_epoch = batches_per_epoch(job.texts, plan.batch_size)
    total = max(1, round(plan.epochs * per_epoch))
    warmup = max(1, round(total * plan.warmup_fraction))
    torch.manual_seed(plan.seed)
    step, history, sums = _resume(job, optimizer)
    module.train()
    saved_at = time.monotonic()
    pause = pause_after(_checkpoint_bytes(module) / WRITTEN_PER_SECOND)
    inputs = 0
    with job.progress.training(job.title, total, start=step) as report:
        while step < total:
            epoch, index = divmod(step, per_epoch)
            for rows in shuffled_rows(job.texts, plan.batch_size, plan.seed, epoch)[index : index + total - step]:
                own = rows.reshape(-1, job.texts.group)[accelerator.process_index :: accelerator.num_processes].reshape(-1)
                share = len(own) * accelerator.num_processes / len(rows)  # so that the mean over processes is that over the texts
                rate = plan.learning_rate * min((step + 1) / warmup, (total - step) / max(1, total - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = rate * (plan.rate_rule(step, group["name"]) if plan.rate_rule else 1.0)
                batch = make_batch(job.texts, own if len(own) else rows[: job.texts.group]).to(device)
                with half_precision(plan.precision, device.type):
                    loss, parts = objective(batch, step)
                value = loss.item()
                if not math.isfinite(value):
                    raise GateFailed(
                        f"{job.title}: the loss became {value} at step {step + 1} of {total}; the last good checkpoint "
                        f"is kept. A smaller learning_rate usually helps"
                    )
                accelerator.backward(loss if share == 1 else loss * share)
                accelerator.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if job.after_step is not None:
                    with torch.no_grad():
                        job.after_step(step, optimizer)
                for name, part in ({"loss": value} | parts).items():
                    sums[name] = sums.get(name, 0.0) + part
                inputs += len(rows)
                report(step, value, inputs)
                if step % per_epoch == 0 or step == total:
                    count = per_epoch if step % per_epoch == 0 else step % per_epoch
                    history.append({"step": step} | {name: value / count for name, value in sums.items()})
                    sums.clear()
                if time.monotonic() - saved_at > pause and accelerator.is_main_process:
                    started = time.monotonic()
                    _save(job, optimizer, step, history, sums)
                    saved_at = time.monotonic()
                    pause = pause_after(saved_at - started)
    module.eval()
    return history


def _decayed(groups: dict[str, list[nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split every group in two: matrices decay, biases and norm weights do not."""
    made = []
    for name, parameters in groups.items():
        for decay, chosen in ((weight_decay, [p for p in parameters if p.ndim > 1]), (0.0, [p for p in parameters if p.ndim <= 1])):
            if chosen:
                made.append({"params": chosen, "weight_decay": decay, "name": name})
    return made


def pause_after(save_seconds: float) -> float:
    """Seconds of training between two checkpoints that take ``save_seconds`` each."""
    return max(CHECKPOINT_SECONDS, save_seconds / CHECKPOINT_SHARE)


def _checkpoint_bytes(module: nn.Module) -> int:
    """Bytes of a checkpoint: the tensors, and two moments of each that learns."""
    return sum(p.nbytes * (3 if p.requires_grad else 1) for p in module.parameters())


def _save(job: TrainingJob, optimizer: Any, step: int, history: list, sums: dict) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, never half of one."""
    tensors = {f"module.{k}": v for k, v in job.module.state_dict().items()}
    state = optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}
    tensors["rng"] = torch.get_rng_state()
    device = next(job.module.parameters()).device
    if device.type != "cpu":
        tensors["device_rng"] = torch.get_device_module(device).get_rng_state()
    # safetensors wants every tensor in memory of its own; shared modules appear once under each name.
    tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()}
    note = {"step": str(step), "history": json.dumps(history), "sums": json.dumps(sums)}
    job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = job.checkpoint.with_suffix(".partial")
    save_file(tensors, partial, note)
    os.replace(partial, job.checkpoint)


def _resume(job: TrainingJob, optimizer: Any) -> tuple[int, list, dict]:
    if not job.checkpoint.is_file():
        return 0, [], {}
    tensors = load_file(job.checkpoint)
    note = _metadata(job.checkpoint)
    job.module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng"])
    device = next(job.module.parameters()).device
    if device.type != "cpu" and "device_rng" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["device_rng"])
    return int(note["step"]), json.loads(note["history"]), json.loads(note["sums"])


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
