"""What the tests of the exporters share: one thread, and a pretrained model with real texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: threads that wait for each other take longer than the work. Given back, as bytes of a run depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def minilm():
    """The published all-MiniLM-L6-v2 with a classifier of random weights, and real commands as its tokenizer cuts them."""
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.source import find_source
    from pipeline.tasks.commands import make_commands

    data = make_commands()
    torch.manual_seed(0)
    checkpoint = Checkpoint.load(find_source("sentence-transformers/all-MiniLM-L6-v2"), data.labels)
    checkpoint.model.classifier.weight.data.normal_(0, 0.5)
    encoded = checkpoint.encode(data.test, {label: i for i, label in enumerate(data.labels)}, 32)
    by_length = np.argsort(encoded.lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, 40).astype(int)]
    return checkpoint.model, [encoded.text(row).tolist() for row in chosen]
