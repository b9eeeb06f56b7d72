"""`volcast serve`."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from volcast.runtime.engine_name import EngineName


def serve(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="Folder written by `volcast export`; left out: the bundled hippocampus model."),
    ] = None,
    http_port: Annotated[int, typer.Option(help="KServe v2 over HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="KServe v2 over gRPC: what volcast's client uses.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus.")] = 8002,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    active: Annotated[int, typer.Option(help="Samples that take turns.")] = 64,
    queue: Annotated[int, typer.Option(help="Samples that may wait; further ones are refused.")] = 256,
    drain: Annotated[int, typer.Option(help="Seconds that requests under way have to end at a stop.")] = 30,
    tritonserver: Annotated[
        Path | None,
        typer.Option(help="Its file or folder; left out: /opt/tritonserver, or the wheel nvidia-pytriton."),
    ] = None,
) -> None:
    """Serve an artifact with NVIDIA Triton Inference Server on this machine's loopback address."""
    from volcast.export.triton_config import Serving, model_name, write_model
    from volcast.runtime.artifact import MANIFEST, read_artifact
    from volcast.runtime.atomic import sha256
    from volcast.runtime.default_artifact import NAME, default_artifact
    from volcast.runtime.engine_auto import resolve_engine

    from .installation import find_installation
    from .supervisor import Ports, Supervisor

    folder = (artifact or default_artifact()).resolve()
    spec = read_artifact(folder)
    name = NAME if artifact is None else model_name(spec)
    engine, threads = resolve_engine(engine, threads)
    serving = Serving(
        artifact=str(folder), artifact_sha256=sha256(folder / MANIFEST), engine=engine, threads=threads, active=active,
        queue=queue,
    )  # fmt: skip
    ports = Ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
    with tempfile.TemporaryDirectory(prefix="volcast-serve-") as scratch:
        installation = find_installation(Path(scratch), tritonserver)
        repository = Path(scratch) / "models"
        repository.mkdir()
        write_model(repository, name, spec, serving)
        supervisor = Supervisor(
            installation, repository, name, ports,
            lambda line: typer.echo(f"volcast: {line}", err=True), drain_s=drain,
        )  # fmt: skip
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: supervisor.stop())
        supervisor.run()
