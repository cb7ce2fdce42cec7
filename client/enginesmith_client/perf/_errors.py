"""What can go wrong with a measurement, besides the errors of the client. Every class is a ``TritonClientError``."""

from __future__ import annotations

from enginesmith_client._errors import TritonClientError


class ProfileError(TritonClientError):
    """The author of the profile must act: an unknown key, a value out of range, something that the model cannot do."""


class ResultsError(TritonClientError):
    """Saved results are missing, damaged, of another version, or cannot be compared."""


class ToolError(TritonClientError):
    """perf_analyzer is missing, does not run here, or did not finish its measurement."""


class MeasurementError(TritonClientError):
    """Nothing was measured: not one request was answered."""
