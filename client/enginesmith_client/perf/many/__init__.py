"""Sweeps over load and suites of scenarios: many runs, resumable."""
