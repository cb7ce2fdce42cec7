"""From records and samples to figures, and whether they may be believed."""
