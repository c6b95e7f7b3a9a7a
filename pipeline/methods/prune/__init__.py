"""Pruning: take away what the task does not need, physically."""
