"""`volcast serve`."""

from __future__ import annotations

import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from volcast.runtime.engine_name import EngineName

if TYPE_CHECKING:
    from .gateway.server import Gateway
    from .supervisor import Supervisor


def serve(
    context: typer.Context,
    artifact: Annotated[
        Path | None,
        typer.Argument(help="Folder written by `volcast export`; left out: the bundled hippocampus model."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where the gateway listens; anything but loopback needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The gateway: page, HTTP API, health, metrics.")] = 8080,
    keys: Annotated[
        Path | None, typer.Option(help="API keys, a line `name key` each; also $VOLCAST_API_KEYS.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file with the certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")
    ] = False,
    rate: Annotated[float, typer.Option(help="Requests a second of one key.")] = 10.0,
    concurrency: Annotated[int, typer.Option(help="Requests of one key that are open.")] = 64,
    max_voxels: Annotated[int, typer.Option(help="Of one volume.")] = 512 * 512 * 128,
    store_mib: Annotated[int, typer.Option(help="Memory for volumes that wait for their callers.")] = 1024,
    max_file_mib: Annotated[
        int, typer.Option(min=8, help="Of a request with its files (images, label maps), in base64.")
    ] = 64,
    held_mib: Annotated[
        int, typer.Option(help="Memory for requests that are read and for images, of all callers together.")
    ] = 1024,
    http_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Triton's own, on loopback: KServe v2 over HTTP.")
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Likewise over gRPC: what volcast's client uses.")
    ] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Likewise for Prometheus.")] = 8002,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    active: Annotated[int, typer.Option(min=1, help="Samples that take turns.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Samples that may wait; further ones are refused.")] = 256,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that requests under way have to end at a stop.")
    ] = 30,
    server: Annotated[
        str | None,
        typer.Option(
            help="Host and port of the gRPC of a Triton that serves it already: only the gateway is started."
        ),
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(help="Its file or folder; left out: /opt/tritonserver, or the wheel nvidia-pytriton."),
    ] = None,
) -> None:
    """Serve an artifact: NVIDIA Triton Inference Server on loopback, kept alive, and a gateway with a page before it."""
    from volcast.export.triton_config import Serving, model_name, write_model
    from volcast.runtime.artifact import MANIFEST, read_manifest
    from volcast.runtime.atomic import sha256
    from volcast.runtime.default_artifact import NAME, default_artifact
    from volcast.runtime.engine_auto import check_engine, resolve_engine
    from volcast.runtime.options import leave_out
    from volcast.runtime.probe import probe_tensors

    from .gateway.application import LOOPBACK, Application
    from .gateway.keys import read_keys
    from .gateway.log import log_to_stderr
    from .gateway.server import Gateway, check_exposure
    from .gateway.settings import Limits, Listening
    from .gateway.tracing import tracing_from_environment
    from .installation import find_installation
    from .supervisor import Ports, Supervisor

    if server is not None:
        own = ("http_port", "grpc_port", "engine", "threads", "active", "queue", "tritonserver")
        leave_out(context, "of a Triton that is started here, not with --server", own)
    listening = Listening(host=host, port=port, certificate=tls_cert, private_key=tls_key, insecure=insecure)
    known = read_keys(keys)
    check_exposure(listening, known)
    limits = Limits(
        rate=rate, concurrency=concurrency, voxels=max_voxels, store_bytes=store_mib * 2**20,
        file_bytes=max_file_mib * 2**20, held_bytes=held_mib * 2**20,
    )  # fmt: skip
    folder = (artifact or default_artifact()).resolve()
    spec = read_manifest(folder)
    check_engine(spec, engine)
    name = NAME if artifact is None else model_name(spec)
    ports = Ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
    if server is None:
        ports.check()
    log_to_stderr()
    address = f"127.0.0.1:{grpc_port}" if server is None else server
    application = Application(
        spec, name, grpc=address, triton_metrics=f"{address.rpartition(':')[0]}:{metrics_port}", keys=known,
        limits=limits, hosts=None if known or insecure else LOOPBACK, tracing=tracing_from_environment(),
    )  # fmt: skip
    if server is not None:
        _watch(Gateway(listening, application, drain_s=drain), None)
        return
    engine, threads = resolve_engine(engine, threads)
    serving = Serving(
        artifact=str(folder), artifact_sha256=sha256(folder / MANIFEST), engine=engine, threads=threads, active=active,
        queue=queue,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="volcast-serve-") as scratch:
        installation = find_installation(Path(scratch), tritonserver)
        gateway = Gateway(listening, application, drain_s=drain)
        repository = Path(scratch) / "models"
        repository.mkdir()
        write_model(repository, name, spec, serving)
        first = probe_tensors(spec)
        _watch(gateway, Supervisor(installation, repository, name, ports, first, _tell, drain_s=drain))


def _watch(gateway: Gateway, supervisor: Supervisor | None) -> None:
    """Run both until SIGINT or SIGTERM; the gateway ends first, and a second signal cuts its patience short."""
    ended = threading.Event()

    def end() -> None:
        gateway.stop()
        ended.set()
        if supervisor is not None:
            supervisor.stop()

    ending = threading.Thread(target=end, name="volcast ends")

    def stop(*_: object) -> None:
        if ending.ident is None:
            ending.start()
        else:
            gateway.hurry()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    gateway.start()
    _tell(f"gateway on {gateway.url}")
    try:
        if supervisor is None:
            ended.wait()
        else:
            supervisor.run()
    finally:
        gateway.hurry()  # whoever still waits does so for a server that did not start
        gateway.stop()


def _tell(line: str) -> None:
    typer.echo(f"volcast: {line}", err=True)
