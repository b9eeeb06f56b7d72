"""`volcast.Client`: volumes from a server, with the arguments of `Model.sample`, over Triton's gRPC stream."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, Literal, Unpack, final

import numpy as np
from numpy.typing import NDArray

from .answers import unpack_volume
from .interface import Array, as_bytes, text_of
from .request import OnStep, Settings
from .volume import Volume

OnPreview = Callable[[int, Volume], None]
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Unavailable(ConnectionError):
    """No server, one that stops, or one that has too much to do."""


@final
class Client:
    """Asks a server for volumes. Safe to use from any thread; `close` it, or use it as a context manager."""

    def __init__(self, address: str = "127.0.0.1:8001", model: str | None = None, *, tries: int = 5) -> None:
        """
        Args:
            address: host and port of Triton's gRPC.
            model: its name on the server; None: the only one there.
            tries: how often a request is sent, always with the same seed, before `Unavailable` is raised.
        """
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        if tries < 1:
            raise ValueError(f"[client] tries={tries}: need 1 or more")
        self._messages = service_pb2
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._address, self._model, self._tries = address, model, tries
        self._inputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def sample(self, seed: int | None = None, *, timeout_s: float | None = None, **asked: Any) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes."""
        return self.sample_many(1, seed, timeout_s=timeout_s, **asked)[0]

    def sample_many(
        self,
        n: int,
        seed: int | None = None,
        *,
        condition: Mapping[str, Any] | None = None,
        size: Sequence[int] | None = None,
        image: Volume | NDArray[np.generic] | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 10,
        priority: int = 0,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        output_format: Literal["float32", "float16", "uint16"] = "float32",
        **settings: Unpack[Settings],
    ) -> list[Volume]:
        """`n` volumes, the same bits as `Model.sample_many` gives where `output_format` is float32.

        Args:
            seed: None: drawn here, so that a second try asks for the same volumes.
            on_step: called with the steps done and to do, over all volumes; what it raises cancels the request.
            on_preview: called with the steps done and the volume as it is by then.
            deadline_s: the server gives the request up when it cannot meet it.
            timeout_s: the client does.

        Raises:
            ValueError: the server refuses the request, in its words.
            Unavailable: no server or no place, after all tries.
            TimeoutError, CancelledError: what they say.
        """
        given: dict[str, Any] = {
            **settings, **(condition or {}), "seed": secrets.randbits(64) if seed is None else seed, "num_samples": n,
            "size": size, "image": image.array if isinstance(image, Volume) else image, "priority": priority,
            "deadline_s": deadline_s, "output_format": output_format, "progress_every": int(on_step is not None),
            "preview_every": preview_every if on_preview is not None else None,
        }  # fmt: skip
        volumes: dict[int, Volume] = {}
        done: dict[int, tuple[int, int]] = {}
        for kind, tensors in self._answers(given, timeout_s):
            sample = int(tensors["sample"][0])
            if kind == "progress" and on_step is not None:
                done[sample] = int(tensors["step"][0]), int(tensors["steps"][0])
                on_step(sum(step for step, _ in done.values()), n * done[sample][1])
            elif kind == "preview" and on_preview is not None:
                on_preview(int(tensors["step"][0]), _framed(tensors, image))
            elif kind == "volume":
                volumes[sample] = _framed(tensors, image)
        return [volumes[sample] for sample in range(n)]

    def answers(self, given: Mapping[str, Any], timeout_s: float | None = None) -> Iterator[dict[str, Array]]:
        """What the server sends for the inputs `given` (interface.py), as it comes, tried once.

        Closing the iterator cancels the request. Raises as `sample_many`.
        """
        import grpc
        from tritonclient.grpc import InferResult

        call, failure = None, None
        try:
            request = self._request(given)
            call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s)
            for response in call:
                if response.error_message:
                    # Raised at the end: Triton 24.10 keeps a request open for ever whose stream is cut before.
                    failure = failure or _error(response.error_message)
                    continue
                result = InferResult(response.infer_response)
                yield {one.name: result.as_numpy(one.name) for one in response.infer_response.outputs}
            if failure is not None:
                raise failure
        except grpc.RpcError as error:
            raise _rpc_error(error, self._address) from error
        finally:
            if call is not None:
                call.cancel()

    def _answers(
        self, given: Mapping[str, Any], timeout_s: float | None
    ) -> Iterator[tuple[str, dict[str, Array]]]:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for left in reversed(range(self._tries)):
            rest = None if end is None else max(0.0, end - time.monotonic())
            try:
                for tensors in self.answers(given, rest):
                    yield text_of(tensors["kind"]), tensors
                return
            except Unavailable as error:
                pause = 0.25 * 2 ** (self._tries - 1 - left)
                hint = re.search(r"retry in ([\d.]+) s", str(error))
                pause = max(pause, float(hint[1])) if hint else pause
                if not left or (end is not None and time.monotonic() + pause > end):
                    raise
                time.sleep(pause)

    def _request(self, given: Mapping[str, Any]) -> Any:
        from tritonclient.utils import triton_to_np_dtype

        if not self._inputs:
            self._describe()
        request = self._messages.ModelInferRequest(model_name=self._model)
        for name, value in given.items():
            if value is None:
                continue
            if name not in self._inputs:
                raise ValueError(f"[client] unknown input {name!r}; known: {', '.join(self._inputs)}")
            datatype, shape = self._inputs[name]
            try:
                given_array = as_bytes(value) if isinstance(value, str) else value
                array = np.asarray(given_array, triton_to_np_dtype(datatype))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"[client] {name}={value!r}: need {datatype} {list(shape)}") from error
            if array.ndim < 2 and array.size == math.prod(shape) and -1 not in shape:
                array = array.reshape(shape)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return request

    def _describe(self) -> None:
        if self._model is None:
            index = self._stub.RepositoryIndex(self._messages.RepositoryIndexRequest(ready=True))
            names = [one.name for one in index.models]
            if not names:
                raise Unavailable(f"[client] the server at {self._address} has no model that is ready")
            if len(names) > 1:
                raise ValueError(f"[client] {self._address} has {', '.join(names)}: give model=")
            self._model = names[0]
        about = self._stub.ModelMetadata(self._messages.ModelMetadataRequest(name=self._model))
        self._inputs = {one.name: (one.datatype, tuple(one.shape)) for one in about.inputs}


def _framed(tensors: Mapping[str, Array], image: Volume | NDArray[np.generic] | None) -> Volume:
    volume = unpack_volume(tensors)
    return Volume(volume.array, image.affine, image.spacing_mm) if isinstance(image, Volume) else volume


def _error(text: str) -> Exception:
    # A stream carries Triton's texts without their codes.
    if re.search(
        r"retry in|the server stops|is not healthy|is not ready|unavailable|not at ready state", text
    ):
        return Unavailable(text)
    return CancelledError(text) if "cancelled" in text else ValueError(text)


def _rpc_error(error: Any, address: str) -> Exception:
    import grpc

    code, text = error.code(), " ".join(str(error.details()).split())
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(f"[client] {address} did not answer in time")
    if code == grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"[client] {address}: {text}")
    if code == grpc.StatusCode.CANCELLED:
        return CancelledError(f"[client] {text}")
    return ValueError(f"[client] {address}: {text}")
