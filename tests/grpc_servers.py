"""A gRPC server of a test's own, in Triton's place."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from tritonclient.grpc import service_pb2_grpc


@contextmanager
def listening(server: service_pb2_grpc.GRPCInferenceServiceServicer) -> Iterator[str]:
    """Its address, while it runs."""
    with ThreadPoolExecutor(4) as pool:
        running = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, running)
        port = running.add_insecure_port("127.0.0.1:0")
        running.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            running.stop(0).wait()
