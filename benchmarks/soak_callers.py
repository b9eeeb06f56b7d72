"""Callers of a soak: requests of every kind, some of which their callers give up, and what became of each."""

from __future__ import annotations

import io
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import nibabel
import numpy as np

from volcast.runtime.answers import unpack_volume
from volcast.runtime.client import Client, Unavailable
from volcast.runtime.exchange import retry_s
from volcast.runtime.interface import FORMATS, Array, text_of
from volcast.runtime.pipeline import Model
from volcast.runtime.volume import Volume

Fate = Literal["wait", "cancel", "disconnect"]
FATES: tuple[Fate, ...] = get_args(Fate)
PATIENCE_S = 60.0
"""For a server that is away or full."""


@final
@dataclass(frozen=True, kw_only=True)
class Kind:
    """A request's inputs and the volumes that `Model.sample_many` makes of them."""

    given: Mapping[str, Any]
    expected: tuple[Volume, ...]


@final
@dataclass(kw_only=True)
class Outcome:
    """What became of a soak's requests.

    Attributes:
        ended: how many, by "answered", "cancelled", "disconnected" (by their callers) or the error that the last try got.
        tries: how many more tries they took, by the error that each got.
        wrong: what must not be: volumes that are missing, twice or of other bits, in words.
    """

    ended: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def make_kinds(model: Model, count: int, seed: int) -> list[Kind]:
    """`count` kinds of requests: steps, schedulers, seeds, samples, guidance, conditions, formats, priorities, previews."""
    chance = random.Random(seed)
    kinds = []
    fields = [one.name for condition in model.spec.conditions for one in condition.fields]
    for number in range(count):
        # A number that crosses as float32 is the same on both sides.
        condition = {
            name: float(np.float32(chance.random())) for name in chance.sample(fields, min(1, len(fields)))
        }
        settings: Any = {
            "steps": chance.randint(1, 60),
            "scheduler": chance.choice(("ddim", "ddpm", "pndm", "dpm-solver++")),
        }
        if condition and chance.random() < 0.3:
            settings["guidance"] = 1.5
        samples, begin = chance.choice((1, 1, 1, 2, 3)), chance.randint(0, 3)
        volumes = list(model.sample_many(begin + samples, number, condition=condition, **settings))[begin:]
        given = {
            **settings, **condition, "seed": number,
            "num_samples": samples, "first_sample": begin, "output_format": FORMATS[number % len(FORMATS)],
            "priority": chance.randint(-8, 8), "progress_every": chance.choice((0, 1, 5)),
            "preview_every": chance.choice((0, 0, 10)),
        }  # fmt: skip
        kinds.append(Kind(given=given, expected=tuple(volumes)))
    return kinds


def soak(
    address: str,
    kinds: list[Kind],
    requests: int,
    *,
    concurrency: int,
    seed: int,
    on_done: Callable[[int], object],
) -> Outcome:
    """Send `requests`; one in ten is cancelled and one in ten loses its connection, each somewhere on its way.

    `on_done` is called with the number of those that have ended, after each.
    """
    outcome, lock, done = Outcome(), threading.Lock(), 0

    def one(number: int) -> None:
        nonlocal done
        chance = random.Random(seed * 1_000_003 + number)
        fate: Fate = chance.choices(FATES, (8, 1, 1))[0]
        ended = _ask(address, chance.choice(kinds), fate, chance, outcome, lock)
        with lock:
            outcome.ended[ended] += 1
            done += 1
            number = done
        on_done(number)

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(one, range(requests)))
    return outcome


def _ask(
    address: str, kind: Kind, fate: Fate, chance: random.Random, outcome: Outcome, lock: threading.Lock
) -> str:
    end, pause = time.monotonic() + PATIENCE_S, 0.1
    leave_after = chance.uniform(0, 0.1)
    while True:
        try:
            if fate == "disconnect":
                with Relay(address) as relay, Client(relay.address) as client:
                    threading.Timer(leave_after, relay.cut).start()
                    _hear(client, kind, None)
            else:
                with Client(address) as client:
                    wrong = _hear(client, kind, chance.randint(1, 3) if fate == "cancel" else None)
                if wrong == "cancelled":
                    return wrong
                if wrong:
                    with lock:
                        outcome.wrong.append(f"{wrong}: {dict(kind.given)}")
            return "answered"
        except (Unavailable, CancelledError) as error:
            if fate == "disconnect":
                return "disconnected"
            name = " ".join(str(error).split())
            if isinstance(error, CancelledError) or time.monotonic() > end:
                return name
            with lock:
                outcome.tries[name.replace(address, "server")[:80]] += 1
            time.sleep(max(pause, retry_s(error) or 0.0))
            pause = min(1.0, 2 * pause)
        except ValueError as error:
            return f"ValueError: {error}"


def _hear(client: Client, kind: Kind, leave: int | None) -> str:
    """Read the answers, `leave` of them or all: what is wrong with them, or "cancelled"."""
    volumes: dict[int, Mapping[str, Array]] = {}
    with closing(client.answers(kind.given)) as answers:
        for number, tensors in enumerate(answers, 1):
            sample = int(tensors["sample"][0])
            if text_of(tensors["kind"]) == "volume":
                if sample in volumes:
                    return f"sample {sample} came twice"
                volumes[sample] = tensors
            if number == leave:
                return "cancelled"
    if len(volumes) < len(kind.expected):
        return f"{len(volumes)} volumes of {len(kind.expected)}"
    other = [number for number, volume in enumerate(kind.expected) if not _same(volumes[number], volume)]
    return f"other bits: samples {other}" if other else ""


def _same(tensors: Mapping[str, Array], volume: Volume) -> bool:
    """Exact but for what a format rounds: float16 as numpy does, uint16 to half a step of its scale."""
    if not np.array_equal(tensors["affine"], volume.affine):
        return False
    if "nifti" in tensors:
        image: Any = nibabel.Nifti1Image.from_bytes(_unzipped(tensors["nifti"].tobytes()))
        return bool(np.array_equal(np.asarray(image.dataobj), volume.array))
    array = unpack_volume(tensors).array
    if "volume_uint16" in tensors:
        # Four roundings to float32: scale, offset, product, sum.
        bound = 0.5 * np.ptp(volume.array) / 65535 + 4 * 2**-24 * 2 * np.abs(volume.array).max()
        return bool(np.abs(array - volume.array).max() <= bound)
    expected = volume.array.astype(np.float16) if "volume_float16" in tensors else volume.array
    return bool(np.array_equal(array, expected.astype(np.float32)))


def _unzipped(content: bytes) -> bytes:
    import gzip

    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return file.read()


@final
class Relay:
    """A connection that can be cut as a broken one is: reset, without a word of farewell from HTTP/2."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._cut, self._known = False, threading.Lock()
        self._threads: list[threading.Thread] = []
        self._keep(self._listener)
        self._begin(self._accept)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        with self._known:
            self._cut = True
            for one in self._sockets:
                _reset(one)

    def _keep(self, one: socket.socket) -> None:
        with self._known:
            self._sockets.append(one)
            if self._cut:
                _reset(one)

    def _begin(self, target: Callable[..., None], *given: socket.socket) -> None:
        self._threads.append(threading.Thread(target=target, args=given, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            ours, _ = self._listener.accept()
            self._keep(ours)
            _reset(self._listener)  # gRPC would connect again
            theirs = socket.create_connection(self._server, timeout=60)
            theirs.settimeout(None)
            self._keep(theirs)
            self._begin(_copy, ours, theirs)
            self._begin(_copy, theirs, ours)
            return
        self.cut()  # no server: who came is not to wait for it


def _reset(one: socket.socket) -> None:
    with suppress(OSError):
        # Lingering for no time: the peer gets RST. The shutdown wakes who reads or writes.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            sink.sendall(content)
    # What one side has ended ends for the other.
    _reset(source)
    _reset(sink)
