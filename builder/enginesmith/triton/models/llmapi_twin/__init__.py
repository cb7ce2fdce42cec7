"""A stand-in for the Python package ``tensorrt_llm`` on machines that have no GPU. For rehearsals only."""
