"""The perf harness: drives load against a model of a Triton server, judges its own numbers, compares and draws them.

Needs the extra ``perf``. Knows nothing of how the model was built. A run goes through these parts::

    _profile (what to measure) -> _workload (requests of the model) -> _loops + _wire, or _perf_analyzer (records)
        -> _observer (server and machine meanwhile) -> _metrics (figures) -> _selfcheck (may they be believed?) -> _run_files
    _sweep, _suite, _compare: many runs -> _report
"""
