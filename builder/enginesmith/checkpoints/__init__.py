"""Checkpoints: where they come from, what makes one acceptable, and reading their tensors lazily."""
