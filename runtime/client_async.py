"""`volcast.AsyncClient`: `Client` for asyncio."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
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
        tries: int = 7,
        shared_memory: bool = False,
    ) -> None:
        """As `Client` says."""
        if tries < 1:
            raise ValueError(f"[client] tries={tries}: need 1 or more")
        self._messages, self._address = Messages(address, model), address
        self._tries, self._shared_memory = tries, shared_memory
        self._channel: Any = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is under way, too."""
        await asyncio.gather(*self._leaving)
        if self._channel is not None:
            await self._channel.close()

    async def sample(self, seed: int | None = None, **options: Unpack[RequestOptions]) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes but for a sweep."""
        refuse_sweep(options)
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
                            exchange.hear(tensors, self._messages.starts)
                return exchange.volumes()
            except Unavailable as error:
                await asyncio.sleep(exchange.pause_s(error))

    async def answers(
        self, given: Mapping[str, Any], timeout_s: float | None = None
    ) -> AsyncGenerator[dict[str, Array], None]:
        """`Client.answers`. Close it (`contextlib.aclosing`) where you leave it before its end."""
        import grpc.aio

        call, failure, reading = None, None, None
        ticket, left = secrets.randbits(64), True
        try:
            stub = self._stub()
            if not self._messages.known:
                index = await stub.RepositoryIndex(self._messages.index(), timeout=timeout_s)
                question = self._messages.metadata(index)
                self._messages.learn(await stub.ModelMetadata(question, timeout=timeout_s))
            message = self._messages.request({**given, "ticket": ticket})
            end = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            call = stub.ModelStreamInfer(iter([message]))
            del message  # once it is sent, a copy of its arrays goes
            while True:
                # gRPC would cut the stream of a task that is cancelled while it reads: see `_withdraw`.
                reading = asyncio.ensure_future(call.read())
                async with asyncio.timeout_at(end):
                    response = await asyncio.shield(reading)
                if response is grpc.aio.EOF:
                    break
                if response.error_message:
                    # Raised at the end, as `Client` does.
                    failure = failure or self._messages.told(response.error_message)
                else:
                    yield self._messages.tensors(response)
            left = False
            if failure is not None:
                raise failure
        except grpc.RpcError as error:
            left = False
            raise self._messages.failed(error) from error
        except TimeoutError as error:
            raise self._messages.late() from error
        finally:
            if call is not None and reading is not None and left:
                # Not awaited here, where a cancelled task may wait for nothing any more.
                leaving = asyncio.ensure_future(self._withdraw(call, reading, ticket))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)

    async def _withdraw(self, call: Any, reading: asyncio.Future[Any], ticket: int) -> None:
        """As `Client._withdraw`."""
        import grpc.aio

        try:
            async with asyncio.timeout(WITHDRAW_S):
                message = self._messages.request({"cancel": ticket})
                async for _ in self._stub().ModelStreamInfer(iter([message]), timeout=WITHDRAW_S):
                    pass
                while await reading is not grpc.aio.EOF:
                    reading = asyncio.ensure_future(call.read())
        except (Exception, asyncio.CancelledError):  # noqa: BLE001  (nobody is left to hear of it)
            call.cancel()

    def _stub(self) -> Any:
        import grpc.aio
        from tritonclient.grpc import service_pb2_grpc

        if self._channel is None:  # not before: a channel belongs to the loop that it is made in
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
