"""NVIDIA's perf_analyzer as a generator of load, with records like our own."""
