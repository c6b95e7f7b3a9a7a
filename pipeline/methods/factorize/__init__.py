"""Factorization: one big matrix becomes the product of two thin ones."""
