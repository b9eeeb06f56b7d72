"""The sampler core in C++: noise schedules, sampling plans, counter-based noise, the loops, the batcher."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

class Schedule:
    """The noise schedule of training, float64 `[T]`: alphas_cumprod = cumprod(1 - betas)."""

    @property
    def betas(self) -> NDArray[np.float64]: ...
    @property
    def alphas_cumprod(self) -> NDArray[np.float64]: ...
    def __len__(self) -> int: ...

def linear_beta(timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule: ...
def scaled_linear_beta(timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule: ...
def sigmoid_beta(
    timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2, sig_range: float = 6.0
) -> Schedule: ...
def cosine(timesteps: int, s: float = 8e-3) -> Schedule: ...

class Spacing(Enum):
    LEADING = ...
    LINSPACE = ...
    TRAILING = ...

class Prediction(Enum):
    EPSILON = ...
    SAMPLE = ...
    V_PREDICTION = ...

class Variance(Enum):
    FIXED_SMALL = ...
    FIXED_LARGE = ...

class Branch(Enum):
    """Which condition the network applies; BOTH: x is `[2N, ...]`, the unconditional half first."""

    CONDITIONAL = ...
    UNCONDITIONAL = ...
    BOTH = ...

def spaced_timesteps(
    spacing: Spacing, train_timesteps: int, steps: int, steps_offset: int = 0
) -> list[int]: ...
def monai_linspace(train_timesteps: int, steps: int, steps_offset: int = 0) -> list[int]: ...

class Plan:
    """Immutable rows of coefficients, one per network call; share it between requests and threads."""

    @property
    def method(self) -> str: ...
    @property
    def train_timesteps(self) -> int: ...
    @property
    def history_slots(self) -> int: ...
    @property
    def keeps_saved(self) -> bool: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def inpaints(self) -> bool: ...
    @property
    def timesteps(self) -> NDArray[np.float64]:
        """What the network is shown, `[rows]`."""
    @property
    def rows(self) -> NDArray[Any]:
        """Structured, read-only, `[rows]`; the fields are those of `Row` in csrc/plan.hpp."""
    def __len__(self) -> int: ...

class Steps:
    def __init__(
        self,
        steps: int,
        *,
        spacing: Spacing = ...,
        steps_offset: int = 0,
        start: int = 0,
        set_alpha_to_one: bool = True,
        monai: bool = False,
    ) -> None: ...

def make_ddim(
    schedule: Schedule,
    steps: Steps,
    prediction: Prediction,
    *,
    clip: tuple[float, float] | None = None,
    eta: float = 0.0,
    reverse: bool = False,
) -> Plan: ...
def make_ddpm(
    schedule: Schedule,
    steps: Steps,
    prediction: Prediction,
    *,
    clip: tuple[float, float] | None = None,
    variance: Variance = ...,
) -> Plan: ...
def make_pndm(
    schedule: Schedule, steps: Steps, prediction: Prediction, *, skip_prk_steps: bool = True
) -> Plan: ...
def make_dpm_solver(
    schedule: Schedule, steps: Steps, prediction: Prediction, *, clip: tuple[float, float] | None = None
) -> Plan: ...
def make_repaint(plan: Plan, *, resamples: int, jump_length: int) -> Plan: ...
def make_rflow(
    steps: int,
    *,
    train_timesteps: int = 1000,
    steps_offset: int = 0,
    start: int = 0,
    use_discrete_timesteps: bool = True,
    use_timestep_transform: bool = False,
    input_img_size_numel: int = 32768,
    base_img_size_numel: int = 32768,
    spatial_dim: int = 3,
    monai: bool = False,
) -> Plan: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def normal(
    seeds: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    step: int,
    shape: Sequence[int],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """Standard normals `[N, *shape]` by (seed, sample, step); step 0 is the initial noise, i + 1 row i's.

    Row i's noise of a known part has step `(i + 1) | KNOWN_NOISE`, that of a jump back `(i + 1) | AGAIN_NOISE`.
    """

KNOWN_NOISE: int
AGAIN_NOISE: int

class Timing:
    """Seconds spent by `run`, and within its network calls."""

    @property
    def total_s(self) -> float: ...
    @property
    def network_s(self) -> float: ...

def run(
    plan: Plan,
    x: NDArray[Any],
    network: Callable[[int, NDArray[Any], Branch], NDArray[Any]],
    seeds: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    *,
    guidance: float | None = None,
    doubled: bool = False,
    on_step: Callable[[int, int], object] | None = None,
    known: NDArray[Any] | None = None,
    keep: NDArray[Any] | None = None,
) -> Timing:
    """Runs the plan on x `[N, ...]` (float32 or float64) in place.

    `network(step, x, branch)` returns an array of x's shape and dtype. The x it is shown is read-only and the same
    array at every step, so copy what must last. `guidance` w gives u + w*(c - u): one BOTH call if `doubled`, else
    two. `on_step(done, total)` follows each row. What it, the network or Ctrl-C raises stops the loop. `known` and
    `keep`, each like one sample of x, are for a plan that inpaints: the image's latent, and 1 where it stays.
    """

class DeviceError(RuntimeError):
    """What the CUDA driver reports: `[cuda] operation: CUDA_ERROR_X (text); remedy`."""

    code: int
    """The driver's CUresult."""
    name: str
    """`CUDA_ERROR_ILLEGAL_ADDRESS`, say."""
    lost: bool
    """The CUDA context is dead: only a new process can use the GPU again."""

@final
class Driver:
    """The CUDA driver API, or its host form: the same functions, carried out by threads of this process.

    The host form calls Python functions where a GPU runs kernels. What a function raises fails its launch:
    the stream skips all that was enqueued before the failure was reported, and streams that wait for skipped
    work do so too. The next `synchronize`, `Event.synchronize` or `Event.done` raises the exception itself,
    once for each stream; then the stream works again. At Python's exit, functions that have begun are waited
    for and the rest is skipped.
    """

    @staticmethod
    def cuda(device: int = 0) -> Driver:
        """Opens the device's primary context, which torch uses too; `device` counts as torch does.

        Raises:
            ValueError: there is no NVIDIA driver or no such GPU, or the driver is older than CUDA 12.0.
            DeviceError: the context cannot be opened; the GPU's memory is full, say.
        """
    @staticmethod
    def host() -> Driver: ...
    @property
    def name(self) -> str:
        """`cuda` or `host`."""
    @property
    def version(self) -> int:
        """The driver API's, 1000 * major + 10 * minor; the host form covers a part of 12.0."""
    @property
    def device_name(self) -> str: ...
    @property
    def capability(self) -> int:
        """86 for compute capability 8.6; 0 for the host form."""
    def error(self, operation: str, code: int) -> DeviceError:
        """The error for a CUresult that another library met; cudaError_t has the same numbers."""

@final
class Event:
    """A point in a stream's work. Waiting threads sleep; there is no timing. Use it from any thread."""

    def __init__(self, driver: Driver) -> None: ...
    def done(self) -> bool:
        """Whether the work before the last record is done; True without a record. Raises what failed."""
    def synchronize(self) -> None:
        """Blocks, without Python's lock, until `done`."""

@final
class Stream:
    """Work in order, beside that of other streams and of torch's default stream. Use it from any thread.

    Destroying it lets the work that it has finish; the host form waits for that.
    """

    def __init__(self, driver: Driver) -> None: ...
    @property
    def handle(self) -> int:
        """For `torch.cuda.ExternalStream`; keep this object as long as that is used."""
    def record(self, event: Event) -> None: ...
    def wait(self, event: Event) -> None:
        """Work enqueued later waits for the event's last record; the caller does not block."""
    def synchronize(self) -> None:
        """Blocks, without Python's lock, until all that was enqueued is done."""
    @overload
    def copy(self, to: DeviceMemory, source: PinnedMemory) -> None: ...
    @overload
    def copy(self, to: PinnedMemory, source: DeviceMemory) -> None:
        """Enqueues a copy of as many bytes as both have; keep both until it is done."""
    def begin_capture(self) -> None:
        """Until `end_capture`, this thread's work on the stream becomes a graph and does not run."""
    def end_capture(self) -> CapturedGraph: ...

@final
class Kernel:
    """One entry of a cubin, loaded into the device's context.

    Raises:
        ValueError: `image` is no cubin, or the driver is the host form.
        DeviceError: the cubin is for another compute capability (CUDA_ERROR_NO_BINARY_FOR_GPU).
    """

    def __init__(self, driver: Driver, image: bytes, entry: str, threads: int, shared_bytes: int) -> None: ...
    def launch(self, stream: Stream, grid: tuple[int, int, int], arguments: bytes) -> None:
        """Adds a launch to the stream's work. `arguments`: as the kernel's parameter space has them.

        Keep this object and what the arguments point to until it is done.
        """

@final
class DeviceMemory:
    """Memory of the device; on the host form the process' own. Raises DeviceError where none is left."""

    def __init__(self, driver: Driver, bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class PinnedMemory:
    """Page-locked memory of the host, zero at first: a buffer of bytes, for `numpy.frombuffer`."""

    def __init__(self, driver: Driver, bytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class CapturedGraph:
    """What a stream captured; for an `Executable`. Memory and kernels that it uses are not kept by it."""

    @property
    def handle(self) -> int: ...

@final
class LatentUpdate:
    """A plan's update as a part of a stream's work, carried out by a thread of the driver's.

    The arrays lie in page-locked memory that a captured step copies to and from the device: x `[N, ...]` and row
    `[N, R]` are the network's input, outs its outputs `[N, ...]`: one, or for guidance the unconditional one and the
    conditional one. All float32 and contiguous. Each call carries out one row of the plan, as `run` does, bit for bit.
    """

    def __init__(
        self, x: NDArray[np.float32], row: NDArray[np.float32], outs: list[NDArray[np.float32]]
    ) -> None: ...
    def start(
        self,
        plan: Plan,
        rows: NDArray[np.float32],
        seeds: NDArray[np.uint64],
        samples: NDArray[np.uint64],
        guidance: float | None = None,
    ) -> None:
        """Begins a trajectory from what x holds. `rows` `[steps, R]`: what the network is shown. The stream is idle."""
    def enqueue(self, stream: Stream) -> None:
        """Adds the update of one row to the stream's work; keep this object until that is done."""
    @property
    def done(self) -> int:
        """Rows carried out."""
    @property
    def failure(self) -> str:
        """Why no further row is carried out, or ""."""

@final
class HostGraph:
    """A graph of one node, which calls `function` on the thread of the stream. Host form only."""

    def __init__(self, driver: Driver, function: Callable[[], object]) -> None: ...
    @property
    def handle(self) -> int: ...

@final
class Executable:
    """The graphs one after another, `repeats` times over, launched as one. Launches of one never overlap.

    The handles are CUgraphs: `torch.cuda.CUDAGraph(keep_graph=True).raw_cuda_graph()`, or a HostGraph's.
    Their nodes are copied, but the memory and kernels that they use are not: keep the CUDAGraph objects as
    long as this. A HostGraph may go once this is made.
    """

    def __init__(self, driver: Driver, graph_handles: Sequence[int], repeats: int = 1) -> None: ...
    def launch(self, stream: Stream) -> None:
        """Enqueues it and returns."""

@final
class LoopTiming:
    """Seconds spent by `run_steps`, those of them within launches, and how many executables were launched."""

    @property
    def total_s(self) -> float: ...
    @property
    def launch_s(self) -> float: ...
    @property
    def launches(self) -> int: ...

def run_steps(
    step: Executable,
    stream: Stream,
    steps: int,
    *,
    ahead: int = 2,
    on_step: Callable[[int, int], object] | None = None,
    snapshot: Executable | None = None,
    preview: Executable | None = None,
    preview_stream: Stream | None = None,
    every: int = 0,
    on_preview: Callable[[int], object] | None = None,
) -> LoopTiming:
    """Launches `step` `steps` times on `stream`, with at most `ahead` launches unfinished, and waits for all.

    `on_step(done, steps)` follows each finished step, in order. What it, `on_preview`, a step or Ctrl-C
    raises ends the launching, at most `ahead` - 1 steps later; it is raised once all that was launched has
    finished.

    With `every`, and then with all four preview arguments: after each `every`-th step, the last one included,
    `snapshot` runs on `stream` and copies the state aside, and `preview` on `preview_stream` works on the
    copy while the steps go on. `on_preview(step)` is called between steps once it is done. A preview that
    comes due while another runs is skipped; the last is awaited.

    Raises:
        ValueError: `steps` or `ahead` is below 1, or the preview arguments are not all or none.
        DeviceError: the driver failed. On the host form, what a function raised is raised instead.
    """

class Overloaded(RuntimeError):
    """The queue is full; a place should be free in `retry_s` seconds."""

    retry_s: float

class Happened(Enum):
    """What became of a sample; the last four end it."""

    PROGRESS = ...
    PREVIEW = ...
    FINISHED = ...
    CANCELLED = ...
    EXPIRED = ...
    FAILED = ...

@final
class BatchEvent:
    """`x`: float32 `[numel]` of a preview or a finished sample, else None; `text`: why a sample failed."""

    @property
    def id(self) -> int: ...
    @property
    def happened(self) -> Happened: ...
    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def x(self) -> NDArray[np.float32] | None: ...

@final
class BatcherStats:
    """Counts since the start. `entries`: branches of samples in network calls; `calls_of`: calls by batch size.

    `network_s`: seconds in network calls; `busy_s`: those in turns, network included; `entry_s`: smoothed, an entry.
    """

    @property
    def active(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def submitted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def finished(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def expired(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def calls_of(self) -> dict[int, int]: ...
    @property
    def network_s(self) -> float: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def entry_s(self) -> float: ...

@final
class Batcher:
    """Step-level continuous batching: samples share network calls, join at the next step, leave when they are done.

    `run` belongs to one thread; everything else is for any.
    """

    def __init__(self, *, active: int = 64, queue: int = 256) -> None:
        """`active` samples take turns, `queue` more may wait for a place among them."""

    def add_group(
        self,
        lanes: Sequence[
            tuple[NDArray[Any], NDArray[Any], Sequence[NDArray[Any]], Callable[[], NDArray[Any]]]
        ],
    ) -> int:
        """Samples that may share calls. Lanes (x `[B, ...]`, row `[B, R]`, further inputs, call), ascending B, first 1.

        `call()` reads the arrays, which are filled before it, and returns float32 of x's size. Every lane must give a
        sample the same bits.
        """

    def submit(
        self,
        group: int,
        plan: Plan,
        x: NDArray[np.float32],
        rows: NDArray[np.float32],
        conditional: Sequence[NDArray[Any]],
        unconditional: Sequence[NDArray[Any]],
        *,
        seed: int,
        sample: int,
        guidance: float | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        preview_every: int = 0,
        known: NDArray[np.float32] | None = None,
        keep: NDArray[np.float32] | None = None,
    ) -> int:
        """One sample's number. x: where the plan's first row begins; rows `[steps, R]`; the inputs of each branch.

        `known`, `keep`: as `run` says.

        Raises:
            Overloaded: the queue is full.
            ValueError: sizes that are not the group's, settings out of range, a closed batcher.
        """

    def cancel(self, id: int) -> bool:
        """Whether the sample had not ended; then it ends before its next step."""

    def run(self) -> None:
        """Takes turns until `close`."""

    def close(self, *, drain: bool) -> None:
        """No more samples; those submitted are finished first (`drain`) or cancelled."""

    def wait(self, timeout_s: float) -> list[BatchEvent]:
        """Events in order; none after the timeout, or when all has ended."""

    @property
    def ended(self) -> bool: ...
    def stats(self) -> BatcherStats: ...
