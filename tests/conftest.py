"""What every test of the project shares. Being here also puts this directory on the import path."""

from __future__ import annotations

import os

from hypothesis import settings

# Two busy cores make any deadline a coin toss; a property either holds or it does not.
settings.register_profile("enginesmith", deadline=None)
settings.load_profile("enginesmith")

# Tests read what is here; a test that would reach for the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
