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
    from pipeline.models.config import head_shape
    from pipeline.models.source import find_source
    from pipeline.tasks.commands import command_rows
    from runtimes.text import TextEncoder

    rows = command_rows()["test"]
    labels = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    head = head_shape("classifier", ["logits"], "first", len(labels), pooler=True)
    checkpoint = Checkpoint.load(find_source("sentence-transformers/all-MiniLM-L6-v2"), [head], labels)
    checkpoint.model.heads["classifier"].weight.data.normal_(0, 0.5)
    encoded = TextEncoder.of(checkpoint.tokenizer, 32).encode_batch([row["text"] for row in rows])
    id_lists = sorted((encoding.ids for encoding in encoded), key=len)
    return checkpoint.model, [id_lists[i] for i in np.linspace(0, len(id_lists) - 1, 40).astype(int)]
