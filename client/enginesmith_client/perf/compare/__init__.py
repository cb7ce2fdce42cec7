"""Two models, versions or saved runs: intervals, and a verdict."""
