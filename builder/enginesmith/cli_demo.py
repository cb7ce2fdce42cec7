"""The verb ``demo``: build, publish, serve, ask and compare, then stop. stdout is data, stderr is progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enginesmith.cli_options import JSON_OPTION, SERVER_OPTION, plain, print_json

if TYPE_CHECKING:
    from enginesmith.cli_build import Published
    from enginesmith.demo import Served
    from enginesmith.demo_graph import ServedGraph
    from enginesmith.graph_spec import GraphSpec
    from enginesmith.report import BuildReport
    from enginesmith_client import Client


@click.command()
@click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SPEC...")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    default=Path("model_repository"),
    show_default=True,
    help="The model repository to publish into and to serve.",
)
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Build steps at the same time."
)
@SERVER_OPTION
@JSON_OPTION
@click.pass_obj
def demo(
    store_root: Path, specs: tuple[Path, ...], repository: Path, *, jobs: int, server: str, as_json: bool
) -> None:
    """Take each SPEC from its checkpoint to a running tritonserver, ask every variant, compare them, and stop.

    \b
    Examples:
      enginesmith demo models/smollm2-135m.yaml
      enginesmith demo models/smollm2-135m.yaml models/minilm-l6.yaml
      enginesmith demo models/smollm2-135m.yaml --repository /tmp/models --json > demo.json
    """
    from enginesmith.cli_build import build_and_publish
    from enginesmith.report_llm import LlmReport

    documents = []
    for spec in specs:
        published = build_and_publish(store_root, spec, repository, jobs=jobs, server=server)
        demonstrate = _demonstrate_llm if isinstance(published.report, LlmReport) else _demonstrate_graph
        documents.append(demonstrate(published, repository, server=server, quiet=as_json))
    if as_json:
        print_json({"demonstrations": documents})
    else:
        click.echo(f"Published in {repository}. Next: enginesmith serve {repository}", err=True)


def _demonstrate_llm(published: Published, repository: Path, *, server: str, quiet: bool) -> dict[str, Any]:
    from enginesmith.cli_build import print_tables
    from enginesmith.demo import QUESTION, comparison_table, measure_served
    from enginesmith.report_llm import LlmReport

    report = published.report
    assert isinstance(report, LlmReport)
    models = [publication.model for publication in published.publications.values()]
    with _served(repository, models, server=server) as (client, on_progress):
        served = list(measure_served(client, models, on_progress=on_progress))
    document = _document(report, served)
    if quiet:
        return document
    click.echo(f"\nQuestion: {QUESTION}")
    for one in served:
        click.echo(f"\n{one.model}:\n  " + one.answer.strip().replace("\n", "\n  "))
    click.echo()
    print_tables([report.as_table(), comparison_table(report.variants, served)])
    return document


def _demonstrate_graph(published: Published, repository: Path, *, server: str, quiet: bool) -> dict[str, Any]:
    from enginesmith.cli_build import print_tables
    from enginesmith.demo_graph import comparison_table, measure_served
    from enginesmith.graph_spec import GraphSpec
    from enginesmith.report_graph import GraphReport

    spec, report = published.plan.spec, published.report
    assert isinstance(spec, GraphSpec)
    assert isinstance(report, GraphReport)
    engines = _on_this_cpu(published, spec)
    models = {published.publications[place].model: engine for place, engine in engines.items()}
    rows = [] if spec.with_text_ensemble else _sample_rows(published)
    with _served(repository, list(models), server=server) as (client, on_progress):
        served = list(measure_served(client, models, task=spec.task, rows=rows, on_progress=on_progress))
    document = _document(report, served)
    if quiet:
        return document
    for one in served:
        click.echo(f"\n{one.model}:\n  " + "\n  ".join(one.shown or ("(takes no text)",)))
    click.echo()
    reports = {variant.variant: variant for variant in report.variants}
    table = comparison_table([reports[variant] for variant, _ in engines], served)
    print_tables([report.as_table(), table])
    return document


def _on_this_cpu(published: Published, spec: GraphSpec) -> dict[tuple[str, str | None], str]:
    """The model that executes the graph, for every deployment that a server without a GPU can run.

    Raises:
        OperatorError: there is none.
    """
    from enginesmith.errors import OperatorError
    from enginesmith.graph_targets import GraphOnnxRuntimeTarget

    targets = {target.name: target for target in spec.targets}
    found = {}
    for variant, name in published.publications:
        target = targets[name or ""]
        if (
            isinstance(target, GraphOnnxRuntimeTarget)
            and target.provider == "cpu"
            and target.backend == "python"
        ):
            found[variant, name] = spec.triton_name(variant)
    if not found:
        raise OperatorError(
            f"no target of {spec.name} runs on this machine's CPU, so there is nothing to demonstrate; all are published",
            hint="add the target `runtime: onnxruntime`, or serve the repository where its runtimes are: enginesmith serve DIR",
        )
    return found


def _sample_rows(published: Published) -> list[dict[str, Any]]:
    """Samples of the graph, each a batch of one."""
    import numpy as np

    key = next(step.key for step in published.plan.steps if step.kind == "sample" and step.variant is None)
    path = min((published.artifacts[key].path / "batches").glob("*.npz"))
    with np.load(path, allow_pickle=False) as archive:
        batch = {name: archive[name] for name in archive.files}
    return [
        {name: array[index : index + 1] for name, array in batch.items()}
        for index in range(len(next(iter(batch.values()))))
    ]


def _document(report: BuildReport, served: Sequence[Served | ServedGraph]) -> dict[str, Any]:
    return {
        "build": report.as_json(),
        "served": [plain(one) | {"batching_gain": one.batching_gain} for one in served],
    }


@contextmanager
def _served(
    repository: Path, models: Sequence[str], *, server: str
) -> Iterator[tuple[Client, Callable[[float | None, str], None]]]:
    """A client of a running server with ``models``, and a function that shows progress.

    Raises:
        OperatorError: the server or a model failed.
    """
    from enginesmith.console import work_display
    from enginesmith.errors import OperatorError
    from enginesmith.triton.server import TritonServer, find_server
    from enginesmith_client import Client, TritonClientError

    instance = TritonServer(
        repository, installation=find_server(server), model_control="explicit", load_models=models
    )
    with work_display(sys.stderr) as on_progress, instance:
        instance.wait_ready(on_progress=on_progress)
        try:
            with Client(f"grpc://{instance.grpc_url}", timeout_s=600) as client:
                yield client, on_progress
        except TritonClientError as error:
            raise OperatorError(error.message, hint=error.hint) from error


VERBS = (demo,)
