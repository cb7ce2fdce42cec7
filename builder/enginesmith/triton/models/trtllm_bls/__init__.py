"""One request through preprocessing, engine and postprocessing, with streams of whole characters."""
