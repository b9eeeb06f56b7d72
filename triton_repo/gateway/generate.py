"""`POST /v1/models/{model}/generate`: a body in, events or one file out."""

from __future__ import annotations

import asyncio
import gzip
import io
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, final

import nibabel
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from volcast.runtime.answers import pack_volume, unpack_volume
from volcast.runtime.interface import Array, text_of
from volcast.runtime.volume import Volume

from .body import BodyReader, Order, Place
from .download import Download
from .drain import Drain
from .events import EventStream, event, unless_gone
from .health import Readiness
from .log import LOGGER
from .metrics import Metrics
from .quota import Budget, Quotas
from .refusal import INTERNAL, Refusal
from .settings import Limits, Timing
from .store import VolumeStore
from .upstream import Upstream


@final
class Generate:
    """An ASGI application for one model. Belongs to one event loop."""

    def __init__(
        self, model: str, reader: BodyReader, upstream: Upstream, store: VolumeStore, quotas: Quotas, drain: Drain,
        metrics: Metrics, readiness: Readiness, limits: Limits, timing: Timing,
    ) -> None:  # fmt: skip
        self._model, self._reader, self._upstream, self._store = model, reader, upstream, store
        self._quotas, self._drain, self._metrics, self._readiness = quotas, drain, metrics, readiness
        self._limits, self._timing, self._budget = limits, timing, Budget(limits.held_bytes)
        # Two threads, so that a body of megabytes neither stops the loop nor everybody else's, and memory stays bounded.
        self._parser = ThreadPoolExecutor(2, "volcast reads")

    def close(self) -> None:
        self._parser.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.path_params["model"] != self._model:
            raise Refusal("not_found", f"[gateway] no such model; there is {self._model}")
        with self._drain.request(), self._quotas.one(request.state.caller), self._budget.request() as hold:
            streams = _streams(request)
            order = await self._order(request, hold)
            hold(order.bytes)
            scope["state"]["log"] |= {"seed": str(order.seed), "samples": order.volumes, "steps": order.steps}
            try:
                if streams:
                    events = self._events(request, order)
                    await EventStream(
                        keep_alive_s=self._timing.keep_alive_s, stall_s=self._timing.stall_s
                    ).send(events, receive, send)
                else:
                    await self._file(request, order, send)
            except Refusal as refusal:
                self._metrics.generations.labels(outcome=refusal.code).inc()
                raise
            self._metrics.generations.labels(outcome=scope["state"]["log"].get("code", "done")).inc()

    async def _order(self, request: Request, hold: Callable[[int], None]) -> Order:
        content = await self._body(request, hold)
        return await asyncio.get_running_loop().run_in_executor(self._parser, self._reader.read, content)

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytes:
        most, headers = self._reader.most_bytes, request.headers
        too_large = Refusal("too_large", f"[request] the body: need {most} bytes or fewer")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal("invalid", "[request] Content-Encoding: send the body as it is")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        parts, size = [], 0
        each_s, each, clock = self._timing.body_s, self._limits.body_bytes, asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(each_s) as patience:
                async for part in request.stream():
                    if (size + len(part)) // each > size // each:
                        patience.reschedule(clock() + each_s)
                    size += len(part)
                    if size > most:
                        raise too_large
                    hold(size)
                    parts.append(part)
        except TimeoutError:
            raise Refusal(
                "invalid", f"[request] the body did not arrive within {each_s:g} s for each {each} bytes"
            ) from None
        except ClientDisconnect:
            raise Refusal("cancelled", "[gateway] the caller went away") from None
        # A page elsewhere can make a browser send other types here without asking first.
        if size and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("invalid", "[request] Content-Type: need application/json")
        return b"".join(parts)

    async def _file(self, request: Request, order: Order, send: Send) -> None:
        if order.volumes != 1:
            raise Refusal("invalid", f"[request] {order.volumes} volumes: one file holds one; send Accept: text/event-stream")  # fmt: skip
        content = await unless_gone(self._only(request, order), request.receive)
        name, headers = self._filename(order.seed, 0), {"x-seed": str(order.seed)}
        answer = Download(content, name, headers, stall_s=self._timing.stall_s)
        await answer(request.scope, request.receive, send)

    async def _only(self, request: Request, order: Order) -> bytes:
        content = b""
        async with aclosing(self._answers(request, order)) as answers:
            async for kind, _, tensors in answers:
                if kind == "volume":
                    content = tensors["nifti"].tobytes()
        return content

    async def _events(self, request: Request, order: Order) -> AsyncGenerator[bytes, None]:
        state = request.scope["state"]
        yield event("accepted", {"request_id": state["request_id"], "seed": str(order.seed)})
        try:
            async with aclosing(self._answers(request, order)) as answers:
                async for kind, sample, tensors in answers:
                    value = self._told(state["caller"], order, kind, sample, tensors)
                    if value is not None:
                        yield event(kind, value)
            yield event("end", {})
        except Refusal as refusal:
            state["log"]["code"] = refusal.code
            yield event("error", refusal.body(state["request_id"]) | _hint(refusal))
        except Exception:  # noqa: BLE001  (it is logged and answered)
            LOGGER.exception("failed", extra={"fields": {"request_id": state["request_id"]}})
            state["log"]["code"] = "internal"
            yield event("error", Refusal("internal", INTERNAL).body(state["request_id"]))

    async def _answers(
        self, request: Request, order: Order
    ) -> AsyncGenerator[tuple[str, int, dict[str, Array]], None]:
        """(kind, sample, tensors), each once also when the request had to be sent again. Raises `Refusal`."""
        began, told = time.perf_counter(), dict[tuple[str, int], int]()
        request_id, log = request.scope["state"]["request_id"], request.scope["state"]["log"]
        try:
            async with aclosing(self._upstream.answers(order.tensors)) as answers:
                async for tensors in answers:
                    kind, sample = text_of(tensors["kind"]), int(tensors["sample"][0])
                    step = int(tensors["step"][0]) if "step" in tensors else 1
                    if step <= told.get((kind, sample), 0):
                        continue
                    if order.place is not None and kind != "progress":
                        tensors = await asyncio.get_running_loop().run_in_executor(
                            self._parser, _placed, tensors, order.place
                        )
                    seconds = time.perf_counter() - began
                    if not told:
                        self._metrics.first.observe(seconds)
                        log["first_s"] = round(seconds, 4)
                    told[kind, sample] = step
                    if kind == "volume":
                        self._metrics.volume.observe(seconds)
                        self._readiness.seen()
                        log["volumes"] = log.get("volumes", 0) + 1
                    yield kind, sample, tensors
        except Refusal as refusal:
            if refusal.code != "internal":
                raise
            # The server's words may hold what is nobody's business.
            LOGGER.error(
                "the server failed", extra={"fields": {"request_id": request_id, "error": refusal.message}}
            )
            raise Refusal("internal", INTERNAL) from refusal
        missing = order.volumes - sum(kind == "volume" for kind, _ in told)
        if missing:
            raise Refusal(
                "internal", f"[gateway] {missing} of {order.volumes} volumes did not come; ask again"
            )

    def _told(
        self, caller: str, order: Order, kind: str, sample: int, tensors: dict[str, Array]
    ) -> dict[str, Any] | None:
        if kind == "progress":
            return {"sample": sample, "step": int(tensors["step"][0]), "steps": int(tensors["steps"][0])}
        content = tensors["nifti"].tobytes()
        filename = self._filename(order.seed, sample)
        if kind == "preview":
            try:
                key = self._store.put(content, owner=caller, filename=filename, preview=True)
            except Refusal:
                return None  # no room: the volumes that wait are worth more
            step = int(tensors["step"][0])
            return {"sample": sample, "step": step, "steps": order.steps, "url": f"/v1/volumes/{key}"}
        key = self._store.put(content, owner=caller, filename=filename, preview=False)
        header = nibabel.Nifti1Header.from_fileobj(gzip.GzipFile(fileobj=io.BytesIO(content)))
        guidance = {"guidance": float(tensors["guidance"][0])} if "guidance" in tensors else {}
        return {
            "sample": sample, **guidance, "seed": str(int(tensors["seed"][0])), "shape": list(header.get_data_shape()),
            "affine": tensors["affine"].reshape(4, 4).tolist(), "seconds": [float(one) for one in tensors["seconds"]],
            "url": f"/v1/volumes/{key}", "bytes": len(content),
        }  # fmt: skip

    def _filename(self, seed: int, sample: int) -> str:
        return f"{self._model}-{seed}-{sample}.nii.gz"


def _placed(tensors: dict[str, Array], place: Place) -> dict[str, Array]:
    """The answer with its volume as a file that lies where `place` does."""
    volume = unpack_volume(tensors, place.spacing_mm)
    return tensors | pack_volume(Volume(volume.array, place.affine, place.spacing_mm), "nifti")


def _streams(request: Request) -> bool:
    """Whether the caller takes events; otherwise it gets a file."""
    taken = {one.partition(";")[0].strip().lower() for one in request.headers.get("accept", "*/*").split(",")}
    if "text/event-stream" in taken:
        return True
    if taken.isdisjoint({"application/gzip", "application/*", "*/*"}):
        raise Refusal("invalid", "[request] Accept: need text/event-stream or application/gzip")
    return False


def _hint(refusal: Refusal) -> dict[str, Any]:
    return {} if refusal.retry_s is None else {"retry_s": refusal.retry_s}
