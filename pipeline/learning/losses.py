"""The losses of knowledge transfer, each with its reduction said out loud. Those on outputs are the task's.

Shapes: t tokens, s token pairs, H width, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def feature_map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of feature maps [t, H], each token normalised to mean 0 and variance 1 without affine.

    MobileBERT's feature map transfer (arXiv:2004.02984 §3.3) as its released code normalises it: a NoNorm student
    need not copy the scale of a LayerNorm teacher.
    """
    size = (student.shape[-1],)
    return functional.mse_loss(functional.layer_norm(student.float(), size), functional.layer_norm(teacher.float(), size))


def attention_loss(student_scores: Tensor, teacher_weights: Tensor, lengths: Tensor) -> Tensor:
    """KL(teacher || student) of attention distributions, averaged over query tokens and heads.

    Args:
        student_scores: log-softmax of the student's scores [s, A], rows as in :class:`~pipeline.learning.teacher.Features`.
        teacher_weights: attention probabilities [s, A].
        lengths: number of query tokens in all, a scalar: what the sum over pairs is divided by.
    """
    weights = teacher_weights.float()
    divergence = torch.xlogy(weights, weights) - weights * student_scores.float()
    return divergence.sum() / (lengths * weights.shape[-1])
