"""Everything that knows Triton: its configuration, its server, the package of a model and the rehearsal of it."""
