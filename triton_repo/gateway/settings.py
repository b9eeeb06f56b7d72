"""What a gateway is told once, when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may ask for.

    Attributes:
        body_bytes: of a request, before it is read, its files left out.
        file_bytes: of a request with its files (images and label maps, in base64), where the model takes some.
        held_bytes: of requests that are read, and thrice the images in those under way (`COPIES`), of all callers together.
        voxels: of one volume; an artifact's own axes may allow far more than the machine can hold.
        previews: of one request, each of which is decoded like a volume.
        rate: requests a second of one key, in the long run; twice as many at once.
        concurrency: requests of one key that are under way.
        store_bytes, store_s: how much and how long the gateway keeps of volumes for their callers to fetch.
    """

    body_bytes: int = 8 * 2**20
    file_bytes: int = 64 * 2**20
    held_bytes: int = 2**30
    voxels: int = 512 * 512 * 128
    previews: int = 256
    rate: float = 10.0
    concurrency: int = 64
    store_bytes: int = 2**30
    store_s: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"[gateway] {name}={value}: need a number above 0")
        if self.file_bytes < self.body_bytes:
            raise ValueError(
                f"[gateway] file_bytes={self.file_bytes}: a request without files may have {self.body_bytes}; need that or more "
                "(--max-file-mib)"
            )
        if self.held_bytes < self.file_bytes:
            raise ValueError(
                f"[gateway] held_bytes={self.held_bytes}: a request may have {self.file_bytes} and would "
                "never be taken; raise --held-mib, or lower --max-file-mib"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds.

    Attributes:
        body_s: for a request's body to arrive; as much again for each further `body_bytes` of files.
        keep_alive_s: between two signs of life on an event stream.
        stall_s: that a caller may take to read an event; a file: and a second more for each 64 KiB.
        patience_s: that a request waits for a server that has gone to come back.
        ready_s: that one answer about readiness holds.
    """

    body_s: float = 30.0
    keep_alive_s: float = 10.0
    stall_s: float = 60.0
    patience_s: float = 60.0
    ready_s: float = 5.0


@final
@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the gateway listens. `certificate` and `private_key`: PEM files, both or none."""

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    private_key: Path | None = None
    insecure: bool = False
