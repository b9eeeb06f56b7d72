"""What both clients share: Triton's messages, made and read, what comes for one request, and when to ask again. No I/O."""

from __future__ import annotations

import math
import re
import reprlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from .answers import fetch_volume, unpack_volume
from .frame import check_grid
from .inpaint import Inpaint, hidden_voxels
from .interface import NEGATIVE, Array, as_bytes, text_of
from .region import Region, make_region
from .request import OnStep, Settings
from .spec import LOW_RES
from .token_choice import ChoiceSettings
from .volume import Volume

OnPreview = Callable[[int, Volume], None]
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
    # A server that is restarted is back within seconds: gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200), ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]  # fmt: skip

WITHDRAW_S = 5.0
"""For a model to say that it has ended a request; then its stream is cut."""
_COME_BACK = (
    "retry in|the server stops|Server is stopping|Server not ready|no available versions|is not healthy|is not ready|"
    "unavailable|not at ready state"
)


class Unavailable(ConnectionError):
    """No server, one that stops, or one that has too much to do."""


def retry_s(error: Unavailable) -> float | None:
    """The seconds after which a server that has too much to do asks for another try; None: it asks for none."""
    hint = re.search(r"retry in ([\d.]+) s", str(error))
    return float(hint[1]) if hint else None


class RequestOptions(Settings, ChoiceSettings, total=False):
    """Keyword arguments of a client's `sample` and `sample_many`: `Settings` of a diffusion model (steps, scheduler,
    guidance, ...) or `ChoiceSettings` of a token model (temperature, top_k, top_p), and

    condition, negative, size, image, inpaint: as `Model.sample_many` takes them.
    on_step: called with the steps done and to do, over all volumes; what it raises cancels the request.
    on_preview: called with the steps done and the volume as it is by then, every `preview_every` (10) steps.
    priority: -8..8, each level doubles the share; of a token or one-pass model higher ones go first.
    deadline_s: the server gives the request up when it cannot meet it.
    timeout_s: the client does.
    output_format: how volumes cross; float32 (the default) gives the bits of `Model.sample_many`.
    """

    condition: Mapping[str, Any] | None
    negative: Mapping[str, Any] | None
    size: Sequence[int] | None
    image: Volume | NDArray[np.generic] | None
    inpaint: Inpaint | None
    on_step: OnStep | None
    on_preview: OnPreview | None
    preview_every: int
    priority: int
    deadline_s: float | None
    timeout_s: float | None
    output_format: Literal["float32", "float16", "uint16"]


@final
class Exchange:
    """One call of `sample_many`: what is sent, what has come, and how often it may be tried."""

    def __init__(
        self, n: int, seed: int | None, options: RequestOptions, tries: int, shared_memory: bool
    ) -> None:
        """`n`: samples, of each of which there is a volume at each weight of guidance."""
        asked: dict[str, Any] = dict(options)
        self._weights = _weights(options)
        asked["guidance"] = self._weights or None
        self._n, self._left, self._pause_s = n * (len(self._weights) or 1), tries, 0.25
        self._on_step: OnStep | None = asked.pop("on_step", None)
        self._on_preview: OnPreview | None = asked.pop("on_preview", None)
        every = asked.pop("preview_every", 10)
        timeout_s = asked.pop("timeout_s", None)
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._image = asked.pop("image", None)
        condition, negative = asked.pop("condition", None) or {}, asked.pop("negative", None) or {}
        inpaint = asked.pop("inpaint", None)
        if isinstance(self._image, Volume) and len(self._image.spacing_mm) == 3:
            check_grid("[sample] the image", self._image.affine, self._image.spacing_mm, None)
        # A drawn seed is drawn here, so that a second try asks for the same volumes.
        self._given: dict[str, Any] = {
            "output_format": "float32", **asked, **condition, **{NEGATIVE + name: value for name, value in negative.items()},
            **({} if inpaint is None else _inpainted(self._image, inpaint)),
            "seed": secrets.randbits(64) if seed is None else seed, "num_samples": n,
            "image": self._image.array if isinstance(self._image, Volume) else self._image,
            "progress_every": int(self._on_step is not None),
            "preview_every": every if self._on_preview is not None else None,
        }  # fmt: skip
        self._maps = [one for name, one in condition.items() if isinstance(one, Volume) and name != LOW_RES]
        self._volumes: dict[int, Volume] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        self._shared_memory = shared_memory
        self._region: Region | None = None

    def rest_s(self) -> float | None:
        """Seconds that a try may take; None: any number."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @contextmanager
    def attempt(self) -> Iterator[dict[str, Any]]:
        """The inputs of one try, for as long as its answers come."""
        if not self._shared_memory:
            yield self._given
            return
        with make_region() as self._region:
            yield {**self._given, "region": self._region.name}

    def hear(self, tensors: Mapping[str, Array], starts: bool) -> None:
        """Take one answer; what a callback raises passes. `starts`: as `Messages.starts`."""
        kind, sample = text_of(tensors["kind"]), int(tensors["sample"][0])
        if kind == "progress" and self._on_step is not None:
            self._steps[sample] = int(tensors["step"][0]), int(tensors["steps"][0])
            self._on_step(sum(step for step, _ in self._steps.values()), self._n * self._steps[sample][1])
        elif kind == "preview" and self._on_preview is not None:
            self._on_preview(int(tensors["step"][0]), self._placed(tensors, starts))
        elif kind == "volume":
            if self._region is not None:
                tensors = fetch_volume(tensors, self._given["output_format"], self._region)
            self._volumes[sample] = self._placed(tensors, starts)

    def volumes(self) -> list[Volume]:
        """All that were asked for, once the answers have ended. Raises `Unavailable`: one has not come."""
        missing = [sample for sample in range(self._n) if sample not in self._volumes]
        if missing:
            raise Unavailable(
                f"[client] the server ended without volume {missing[0]} of {self._n}; ask again"
            )
        return [self._volumes[sample] for sample in range(self._n)]

    def pause_s(self, error: Unavailable) -> float:
        """Seconds to wait before the next try; raises `error` where there is none."""
        self._left -= 1
        pause = max(self._pause_s, retry_s(error) or 0.0)
        self._pause_s *= 2
        if not self._left or (self._end is not None and time.monotonic() + pause > self._end):
            raise error
        return pause

    def _placed(self, tensors: Mapping[str, Array], starts: bool) -> Volume:
        """The volume in an answer, where `Model.sample_many` places it (`place_of`)."""
        volume = unpack_volume(tensors)
        image = [self._image] if starts and isinstance(self._image, Volume) else []
        for place in (*image, *self._maps)[:1]:
            return Volume(volume.array, place.affine, place.spacing_mm)
        return volume


def refuse_sweep(options: RequestOptions) -> None:
    """ValueError: several weights of guidance, where one volume is wanted."""
    if _sweeps(options.get("guidance")):
        raise ValueError("[sample] guidance: several weights make several volumes; call sample_many")


def _weights(options: RequestOptions) -> tuple[Any, ...]:
    given: Any = options.get("guidance")
    if given is None:
        return ()
    weights = tuple(given) if _sweeps(given) else (given,)
    if not weights:
        raise ValueError("[sample] guidance: 0 weights: give one or several, or leave it out")
    return weights


def _sweeps(guidance: Any) -> bool:
    return isinstance(guidance, Iterable) and not isinstance(guidance, str)


def _inpainted(image: Any, inpaint: Inpaint) -> dict[str, Any]:
    """The inputs of a part to paint anew, whose place only the client knows. ValueError: it is not the image's."""
    if image is None:
        raise ValueError("[sample] inpaint without an image: give the image that its mask is of")
    return {
        "inpaint_mask": hidden_voxels(image, inpaint.mask, np.asarray(image).shape), "inpaint_paste": inpaint.paste,
        "inpaint_resamples": inpaint.resamples, "inpaint_jump_length": inpaint.jump_length,
    }  # fmt: skip


def _told(value: Any) -> str:
    """One line: arrays by type and shape."""
    given = value.array if isinstance(value, Volume) else value
    if isinstance(given, np.ndarray) and given.ndim:
        return f"{given.dtype} {given.shape}"
    return " ".join(reprlib.repr(given).split())


@final
class Messages:
    """Triton's gRPC messages to and from one model of the server at `address` (ValueError: no host and port)."""

    def __init__(self, address: str, model: str | None) -> None:
        from tritonclient.grpc import service_pb2

        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(
                f"[client] address {address!r}: need HOST:PORT of the server's gRPC, as 127.0.0.1:8001"
            )
        self._pb, self._address, self._model = service_pb2, address, model
        self._inputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    @property
    def address(self) -> str:
        """Host and port of the server."""
        return self._address

    @property
    def known(self) -> bool:
        """Whether the model's inputs have been learnt."""
        return bool(self._inputs)

    @property
    def starts(self) -> bool:
        """Whether the model's volumes start from the image of a request, and so lie where it does; else they have its style."""
        return "strength" in self._inputs

    def index(self) -> Any:
        """The question which models there are."""
        return self._pb.RepositoryIndexRequest(ready=True)

    def metadata(self, index: Any) -> Any:
        """The question what the model's inputs are, out of the answer to `index`."""
        if self._model is None:
            names = [one.name for one in index.models]
            if not names:
                raise Unavailable(f"[client] the server at {self._address} has no model that is ready")
            if len(names) > 1:
                raise ValueError(f"[client] {self._address} has {', '.join(names)}: give model=")
            self._model = names[0]
        return self._pb.ModelMetadataRequest(name=self._model)

    def config(self) -> Any:
        """The question for the model's config.pbtxt, once its inputs are known."""
        return self._pb.ModelConfigRequest(name=self._model)

    def learn(self, metadata: Any) -> None:
        """Keep the model's inputs."""
        self._inputs = {one.name: (one.datatype, tuple(one.shape)) for one in metadata.inputs}

    def request(self, given: Mapping[str, Any]) -> Any:
        """The request with the inputs `given`, None for what is left out. ValueError: one has another name or type."""
        from tritonclient.utils import triton_to_np_dtype

        request = self._pb.ModelInferRequest(model_name=self._model)
        for name, value in given.items():
            if value is None:
                continue
            if name not in self._inputs:
                raise ValueError(f"[client] unknown input {name!r}; known: {', '.join(self._inputs)}")
            datatype, shape = self._inputs[name]
            try:
                given_array = as_bytes(value) if isinstance(value, str) else value
                with np.errstate(invalid="ignore"):  # NaN as a whole number, which the comparison finds
                    array = np.asarray(given_array, triton_to_np_dtype(datatype))
                if array.dtype.kind in "iu" and not np.array_equal(array, given_array):
                    raise ValueError(name)  # a fraction, which numpy would cut off
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"[client] {name}={_told(value)}: need {datatype} {list(shape)}") from error
            if name == "image" and array.ndim == len(shape) + 1 and array.shape[0] == 1:
                array = array[0]  # its one channel, as `Model.sample` takes it
            if array.ndim < 2 and array.size == math.prod(shape) and -1 not in shape:
                array = array.reshape(shape)
            elif array.ndim == 0 and shape == (-1,):
                array = array.reshape(1)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return request

    def tensors(self, response: Any) -> dict[str, Array]:
        """An answer's tensors by name."""
        from tritonclient.grpc import InferResult

        result = InferResult(response.infer_response)
        return {one.name: result.as_numpy(one.name) for one in response.infer_response.outputs}

    def told(self, text: str) -> Exception:
        """The error that a stream tells of: it carries Triton's texts without their codes."""
        if re.search(_COME_BACK, text):
            return Unavailable(text)
        return CancelledError(text) if "cancelled" in text else ValueError(text)

    def late(self) -> TimeoutError:
        return TimeoutError(f"[client] {self._address} did not answer in time")

    def failed(self, error: Any) -> Exception:
        """The error that a `grpc.RpcError` stands for."""
        import grpc

        code, text = error.code(), " ".join(str(error.details()).split())
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.late()
        # The latter is what gRPC for asyncio says of a connection that breaks under a request (status INTERNAL).
        if code == grpc.StatusCode.UNAVAILABLE or text == "Internal error from Core":
            return Unavailable(f"[client] {self._address}: {text}")
        if code == grpc.StatusCode.CANCELLED:
            return CancelledError(f"[client] {text}")
        return ValueError(f"[client] {self._address}: {text}")
