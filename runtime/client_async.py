"""`volcast.AsyncClient`: `Client` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Unpack, final

from .exchange import CHANNEL_OPTIONS, Exchange, Messages, RequestOptions, Unavailable
from .interface import Array
from .volume import Volume


@final
class AsyncClient:
    """Asks a server for volumes, within one event loop. `close` it, or use it as an asynchronous context manager.

    A task that is cancelled cancels its request: the server lets its samples go before their next step.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        model: str | None = None,
        *,
        tries: int = 5,
        shared_memory: bool = False,
    ) -> None:
        """As `Client` says."""
        if tries < 1:
            raise ValueError(f"[client] tries={tries}: need 1 or more")
        self._messages, self._address = Messages(address, model), address
        self._tries, self._shared_memory = tries, shared_memory
        self._channel: Any = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is under way, too."""
        if self._channel is not None:
            await self._channel.close()

    async def sample(self, seed: int | None = None, **options: Unpack[RequestOptions]) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes."""
        return (await self.sample_many(1, seed, **options))[0]

    async def sample_many(
        self, n: int, seed: int | None = None, **options: Unpack[RequestOptions]
    ) -> list[Volume]:
        """`Client.sample_many`; callbacks run in the event loop."""
        exchange = Exchange(n, seed, options, self._tries, self._shared_memory)
        while True:
            try:
                with exchange.attempt() as given:
                    async with aclosing(self.answers(given, exchange.rest_s())) as answers:
                        async for tensors in answers:
                            exchange.hear(tensors)
                return exchange.volumes()
            except Unavailable as error:
                await asyncio.sleep(exchange.pause_s(error))

    async def answers(
        self, given: Mapping[str, Any], timeout_s: float | None = None
    ) -> AsyncGenerator[dict[str, Array], None]:
        """`Client.answers`. Close it (`contextlib.aclosing`) where you leave it before its end."""
        import grpc

        call, failure = None, None
        try:
            stub = self._stub()
            if not self._messages.known:
                index = await stub.RepositoryIndex(self._messages.index())
                self._messages.learn(await stub.ModelMetadata(self._messages.metadata(index)))
            call = stub.ModelStreamInfer(iter([self._messages.request(given)]), timeout=timeout_s)
            async for response in call:
                if response.error_message:
                    # Raised at the end, as `Client` does.
                    failure = failure or self._messages.told(response.error_message)
                else:
                    yield self._messages.tensors(response)
            if failure is not None:
                raise failure
        except grpc.RpcError as error:
            raise self._messages.failed(error) from error
        finally:
            if call is not None:
                call.cancel()

    def _stub(self) -> Any:
        import grpc.aio
        from tritonclient.grpc import service_pb2_grpc

        if self._channel is None:  # not before: a channel belongs to the loop that it is made in
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
