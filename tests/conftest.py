"""What every test of the project shares. Being here also puts this directory on the import path."""

from __future__ import annotations

import os

from hypothesis import settings

# Two busy cores make any deadline a coin toss. The same examples every time: what passed once says nothing against a change
# that fails. Others, and many more of them, are tried by `pytest --hypothesis-profile explore`.
settings.register_profile("enginesmith", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1500)
settings.load_profile("enginesmith")

# Tests read what is here; a test that would reach for the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
