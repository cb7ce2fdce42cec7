"""Engines: what each runtime executes, made from one quantized checkpoint."""
