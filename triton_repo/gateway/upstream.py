"""The model behind the gateway: one stream of answers a request, sent again when the server under it is replaced."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, final

from volcast.runtime.interface import Array

from .refusal import Refusal

_OPTIONS = [
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
    # A restarted server is found again at once, not after gRPC's own back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]  # fmt: skip
_HINT = re.compile(r"retry in ([\d.]+) s")
_GONE = re.compile(r"the server stops|is not healthy|is not ready|unavailable|not at ready state")
_OWN = re.compile(r"\[(request|sample|condition)\] ")
_STOPS = "[gateway] the server stops; ask again"


LOST = 4
"""How many servers a request may lose: one that ends them must not be sent for ever."""


class _Gone(Exception):
    """No server, or one that stops: the same request may be sent to the next one. `unreached`: it never got there."""

    def __init__(self, text: str, *, unreached: bool = False) -> None:
        super().__init__(text)
        self.unreached = unreached


@final
class Upstream:
    """Belongs to the event loop that calls `start`. Every answer for a request comes from its seed, so that sending a
    request again changes nothing but time."""

    def __init__(
        self, address: str, model: str, *, patience_s: float, on_resend: Callable[[], None] = lambda: None
    ) -> None:
        """`address`: host and port of Triton's gRPC. `patience_s`: for how long a server may be away."""
        self._address, self._model, self._patience_s, self._on_resend = address, model, patience_s, on_resend
        self._channel: Any = None
        self._stub: Any = None
        self._stopped = asyncio.Event()

    def start(self) -> None:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        """End every request under way: each raises `Refusal`."""
        self._stopped.set()
        if self._channel is not None:
            await self._channel.close()

    async def answers(
        self, request_id: str, tensors: Mapping[str, Array], *, resend: bool = True
    ) -> AsyncGenerator[dict[str, Array], None]:
        """What the model sends, as it comes. Closing the generator cancels the request at the server.

        When a server is replaced the request begins again and so do its answers; `resend` False: it fails instead.
        Raises `Refusal`.
        """
        message = self._message(request_id, tensors)
        since: float | None = None
        lost, pause = 0, 0.1
        while True:
            try:
                async with aclosing(self._once(message)) as once:
                    async for answer in once:
                        yield answer
                        since, pause = None, 0.1
                return
            except (_Gone, Refusal) as error:
                # One that was taken before is not refused because others were quicker at the new server.
                full = isinstance(error, Refusal) and error.retry_s is not None and since is not None
                if not (isinstance(error, _Gone) or full) or self._stopped.is_set():
                    raise _told(error) from error
                since = time.monotonic() if since is None else since
                lost += isinstance(error, _Gone) and not error.unreached
                if not resend or lost > LOST or time.monotonic() + pause > since + self._patience_s:
                    raise _told(error) from error
            self._on_resend()
            await self._wait(pause)
            pause = min(1.0, 2 * pause)

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Refusal("unavailable", _STOPS, 5.0)

    async def _once(self, message: Any) -> AsyncGenerator[dict[str, Array], None]:
        import grpc
        from tritonclient.grpc import InferResult

        if self._stopped.is_set():
            raise Refusal("unavailable", _STOPS, 5.0)
        failure: Exception | None = None
        call = self._stub.ModelStreamInfer(iter([message]))
        try:
            async for response in call:
                if response.error_message:
                    # Raised at the end: Triton 24.10 keeps a request open for ever whose stream is cut before.
                    failure = failure or _failure(response.error_message)
                    continue
                result = InferResult(response.infer_response)
                yield {one.name: result.as_numpy(one.name) for one in response.infer_response.outputs}
            if failure is not None:
                raise failure
        except grpc.aio.AioRpcError as error:
            text = " ".join(str(error.details()).split())
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise _Gone(text, unreached="connect" in text.lower()) from error
            raise _failure(text) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped.is_set() and task is not None and not task.cancelling():
                raise Refusal("unavailable", _STOPS, 5.0) from None
            raise
        finally:
            call.cancel()

    def _message(self, request_id: str, tensors: Mapping[str, Array]) -> Any:
        from tritonclient.grpc import service_pb2
        from tritonclient.utils import np_to_triton_dtype

        message = service_pb2.ModelInferRequest(model_name=self._model, id=request_id)
        for name, array in tensors.items():
            message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
        return message


def _told(error: _Gone | Refusal) -> Refusal:
    if isinstance(error, Refusal):
        return error
    return Refusal("unavailable", f"[gateway] the server is away ({error}); ask again", 5.0)


def _failure(text: str) -> Exception:
    """A stream carries the server's texts without their codes."""
    text = " ".join(text.split())
    hint = _HINT.search(text)
    if hint:
        return Refusal("unavailable", text, float(hint[1]))
    if "deadline cannot be met" in text:
        return Refusal("unavailable", text)
    if _GONE.search(text):
        return _Gone(text)
    if "cancelled" in text:
        return Refusal("cancelled", text)
    return Refusal("invalid" if _OWN.match(text) else "internal", text)
