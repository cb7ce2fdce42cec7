"""Verification: scores of the PyTorch references, figures of engines against them, and the gate."""
