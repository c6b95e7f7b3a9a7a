"""Stages that are plumbing rather than a paper: fine-tune, export, quantize, bench, pack."""
