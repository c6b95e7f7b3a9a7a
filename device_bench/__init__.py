"""Measure model files where they will run: targets, the agent that runs there, and the merging of its samples.

Imports numpy and ``runtimes``; never ``exporters`` or ``pipeline``.
"""
