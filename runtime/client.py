"""`volcast.Client`: volumes from a server, with the arguments of `Model.sample`, over Triton's gRPC stream."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from typing import Any, Unpack, final

from .exchange import (
    CHANNEL_OPTIONS,
    WITHDRAW_S,
    Exchange,
    Messages,
    RequestOptions,
    Unavailable,
    refuse_sweep,
)
from .interface import Array
from .volume import Volume

__all__ = ["Client", "Unavailable"]


@final
class Client:
    """Asks a server for volumes. Safe to use from any thread; `close` it, or use it as a context manager."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        model: str | None = None,
        *,
        tries: int = 7,
        shared_memory: bool = False,
    ) -> None:
        """
        Args:
            address: host and port of Triton's gRPC.
            model: its name on the server; None: the only one there.
            tries: how often a request is sent, always with the same seed, before `Unavailable` is raised; between them pass
                0.25 s, 0.5 s, 1 s and so on: 16 s in all, in which `volcast serve` has restarted a server.
            shared_memory: volumes come through /dev/shm, for a server on this machine; previews and images as messages.
        """
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        if tries < 1:
            raise ValueError(f"[client] tries={tries}: need 1 or more")
        self._messages, self._tries, self._shared_memory = Messages(address, model), tries, shared_memory
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def sample(self, seed: int | None = None, **options: Unpack[RequestOptions]) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes but for a sweep."""
        refuse_sweep(options)
        return self.sample_many(1, seed, **options)[0]

    def sample_many(self, n: int, seed: int | None = None, **options: Unpack[RequestOptions]) -> list[Volume]:
        """`n` volumes, of several weights of guidance as many each, in the order and with the bits of `Model.sample_many`
        where `output_format` is float32, its default.

        Args:
            seed: sample i takes its noise from (seed, i); None: drawn.
            options: `RequestOptions`.

        Raises:
            ValueError: the server refuses the request, in its words.
            Unavailable: no server or no place, after all tries.
            TimeoutError, concurrent.futures.CancelledError: what they say.
        """
        exchange = Exchange(n, seed, options, self._tries, self._shared_memory)
        while True:
            try:
                with (
                    exchange.attempt() as given,
                    closing(self.answers(given, exchange.rest_s())) as answers,
                ):
                    for tensors in answers:
                        exchange.hear(tensors, self._messages.starts)
                return exchange.volumes()
            except Unavailable as error:
                time.sleep(exchange.pause_s(error))

    def answers(
        self, given: Mapping[str, Any], timeout_s: float | None = None
    ) -> Generator[dict[str, Array], None, None]:
        """What the server sends for the inputs `given` (interface.py), as it comes, tried once.

        Closing the generator cancels the request. Raises as `sample_many`.
        """
        return self._answers(given, timeout_s, WITHDRAW_S)

    def _answers(
        self, given: Mapping[str, Any], timeout_s: float | None, grace_s: float
    ) -> Generator[dict[str, Array], None, None]:
        """`grace_s`: after `timeout_s`, for the model to end the request, before gRPC cuts its stream."""
        import grpc

        call, failure, ticket, left = None, None, secrets.randbits(64), True
        late = threading.Event()
        timer = threading.Timer(timeout_s or 0.0, self._expire, (ticket, late))
        timer.daemon = True
        try:
            self._learn(timeout_s)
            message = self._messages.request({**given, "ticket": ticket})
            hard = None if timeout_s is None else timeout_s + grace_s
            call = self._stub.ModelStreamInfer(iter([message]), timeout=hard)
            if timeout_s is not None and grace_s:
                timer.start()
            for response in call:
                if response.error_message:
                    # Raised at the end: Triton 24.10 keeps a request open for ever whose stream is cut before.
                    failure = failure or self._messages.told(response.error_message)
                else:
                    yield self._messages.tensors(response)
            left = False
            if failure is not None:
                raise self._messages.late() if late.is_set() else failure
        except grpc.RpcError as error:
            left = False
            raise self._messages.failed(error) from error
        finally:
            timer.cancel()
            if call is not None and left:
                self._withdraw(call, ticket)

    def _expire(self, ticket: int, late: threading.Event) -> None:
        import grpc

        late.set()
        with suppress(grpc.RpcError, ValueError):
            for _ in self._stub.ModelStreamInfer(
                iter([self._messages.request({"cancel": ticket})]), timeout=WITHDRAW_S
            ):
                pass

    def _withdraw(self, call: Any, ticket: int) -> None:
        """Ask the model to end a request, and read its stream to the end: Triton 24.10 may die of one that is cut."""
        import grpc

        late = threading.Timer(WITHDRAW_S, call.cancel)
        late.start()
        try:
            message = self._messages.request({"cancel": ticket})
            for stream in (self._stub.ModelStreamInfer(iter([message]), timeout=WITHDRAW_S), call):
                for _ in stream:
                    pass
        except (grpc.RpcError, ValueError):  # no server, or a channel that was closed meanwhile
            call.cancel()
        finally:
            late.cancel()

    def parameters(self, timeout_s: float | None = None) -> dict[str, str]:
        """What the model's config.pbtxt says of it: artifact_sha256, engine, threads and more. Raises as `sample_many`."""
        import grpc

        try:
            self._learn(timeout_s)
            answer = self._stub.ModelConfig(self._messages.config(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._messages.failed(error) from error
        return {key: value.string_value for key, value in answer.config.parameters.items()}

    def probe(self, timeout_s: float) -> None:
        """Return when the model has answered.

        The question is one that the model itself refuses, at once and whatever else it does: Triton calls a model ready
        whose process is dead. Raises as `sample_many`.
        """
        try:
            for _ in self._answers({"num_samples": 0}, timeout_s, 0.0):
                pass
        except ValueError as error:
            if "num_samples=0" not in str(error):
                raise
        else:
            raise ValueError(f"[client] {self._messages.address} accepts bad requests")

    def _learn(self, timeout_s: float | None) -> None:
        if not self._messages.known:
            index = self._stub.RepositoryIndex(self._messages.index(), timeout=timeout_s)
            question = self._messages.metadata(index)
            self._messages.learn(self._stub.ModelMetadata(question, timeout=timeout_s))
