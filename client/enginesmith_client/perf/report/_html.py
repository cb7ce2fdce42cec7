"""A report as one HTML page that needs nothing but itself: no network, no script, no fonts.

The page forbids itself to load anything (Content-Security-Policy), so that nothing which a server or a user named can.
"""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from enginesmith_client.perf.report._charts import svg_of
from enginesmith_client.perf.report._model import Report
from enginesmith_client.perf.report._plots import Plot


def html_of(report: Report) -> str:
    """The page; readable in light and dark, narrow and wide, and on paper."""
    return _environment().get_template("report.html").render(report=report)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("enginesmith_client.perf.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = _svg
    return environment


def _svg(plot: Plot) -> Markup:
    # svg_of escapes all that is not its own.
    return Markup(svg_of(plot))
