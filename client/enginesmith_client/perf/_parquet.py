"""The records of a run as Parquet, for tools that read tables. Needs pyarrow (extra ``parquet``)."""

from __future__ import annotations

from pathlib import Path

from enginesmith_client.perf._errors import ToolError
from enginesmith_client.perf._run_files import SavedRun
from enginesmith_client.perf._saved_files import appearing

PARQUET_FILE = "records.parquet"


def require_pyarrow() -> None:
    """Return when pyarrow is installed.

    Raises:
        ToolError: it is not.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ToolError(
            "records as Parquet need pyarrow, which is not installed",
            hint="pip install 'enginesmith-client[perf,parquet]'",
        ) from error


def write_parquet(saved: SavedRun) -> Path:
    """Write the records of a run beside them, a row each, with the columns of ``Record``; the file is complete or absent.

    Raises:
        ToolError: pyarrow is not installed.
        ResultsError: the records cannot be read, or the table cannot be written.
    """
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = saved.records()
    columns = {
        name: pa.array([getattr(record, name) for record in records], kind)
        for name, kind in (
            ("number", pa.int64()),
            ("due_ns", pa.int64()),
            ("sent_ns", pa.int64()),
            ("ended_ns", pa.int64()),
            ("outcome", pa.string()),
            ("error", pa.string()),
            ("rows", pa.int32()),
            ("prompt_tokens", pa.int32()),
            ("output_tokens", pa.int32()),
            ("piece_ns", pa.list_(pa.int64())),
        )
    }
    path = saved.directory / PARQUET_FILE
    with appearing(path) as staging:
        pq.write_table(pa.table(columns), staging)
    return path
