"""The verb ``demo``: build, publish, serve, ask and compare, then stop. stdout is data, stderr is progress."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from enginesmith.cli_options import JSON_OPTION, SERVER_OPTION, plain, print_json


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
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
def demo(store_root: Path, spec: Path, repository: Path, *, jobs: int, server: str, as_json: bool) -> None:
    """Take SPEC from its checkpoint to a running tritonserver, ask every variant, compare them, and stop.

    \b
    Examples:
      enginesmith demo models/smollm2-135m.yaml
      enginesmith demo models/smollm2-135m.yaml --repository /tmp/models --json > demo.json
    """
    from enginesmith.cli_build import build_and_publish, print_tables
    from enginesmith.console import work_display
    from enginesmith.demo import QUESTION, comparison_table, measure_served
    from enginesmith.errors import OperatorError
    from enginesmith.triton.server import TritonServer, find_server
    from enginesmith_client import Client, TritonClientError

    report, publications = build_and_publish(store_root, spec, repository, jobs=jobs, server=server)
    models = [publication.model for publication in publications]
    instance = TritonServer(
        repository, installation=find_server(server), model_control="explicit", load_models=models
    )
    with work_display(sys.stderr) as on_progress, instance:
        instance.wait_ready(on_progress=on_progress)
        try:
            with Client(f"grpc://{instance.grpc_url}", timeout_s=600) as client:
                served = list(measure_served(client, models, on_progress=on_progress))
        except TritonClientError as error:
            raise OperatorError(error.message, hint=error.hint) from error
    if as_json:
        print_json(
            {
                "build": report.as_json(),
                "served": [plain(one) | {"batching_gain": one.batching_gain} for one in served],
            }
        )
        return
    click.echo(f"\nQuestion: {QUESTION}")
    for one in served:
        click.echo(f"\n{one.model}:\n  " + one.answer.strip().replace("\n", "\n  "))
    click.echo()
    print_tables([report.as_table(), comparison_table(report.variants, served)])
    click.echo(f"Published in {repository}. Next: enginesmith serve {repository}", err=True)


VERBS = (demo,)
