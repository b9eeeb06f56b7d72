"""The image that leaves the device lies in the arena of the program that made it."""

from __future__ import annotations

import pytest
import torch
from decoder_programs import Decoder

from volcast.runtime.device.decoding import Whole, image_place
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.memory import ALIGNMENT, MemoryPlan

CPU = torch.device("cpu")


def planned(begin: int, total: int) -> MemoryPlan:
    return MemoryPlan(bytes=total, offsets={"image": begin}, views={}, in_place={}, live_bytes=total)


def test_it_lies_before_the_program_s_image_or_behind_it() -> None:
    half, wide = ((1, 1, 10, 10, 10), torch.float16), ((1, 1, 10, 10, 10), torch.float32)
    behind = 2048  # 2000 bytes, up to a multiple of 256
    assert behind % ALIGNMENT == 0
    assert image_place(planned(4096, 8192), half) == (0, 8192)
    assert image_place(planned(3840, 8192), half) == (3840 + behind, 3840 + behind + 4000)
    assert image_place(planned(0, 8192), half) == (behind, 8192)
    assert image_place(planned(0, 2048), half) == (behind, behind + 4000)
    assert image_place(planned(256, 8192), wide) == (256, 8192)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_decoding_takes_no_memory_besides(dtype: torch.dtype) -> None:
    made = Decoder((16, 32), groups=4, axes=2, dtype=dtype)
    inputs = {"z": ((1, 4, 6, 5), dtype)}
    alone = Executor(made.program, made.weights, inputs, CPU)
    _, size = image_place(alone.plan, alone.specs["image"])
    assert size == alone.plan.bytes  # what lay there is no longer read
    arena = torch.empty(size, dtype=torch.uint8)
    decoder = Whole(Executor(made.program, made.weights, inputs, CPU, arena), 2.0)
    z = torch.randn(1, 4, 6, 5)
    for _ in range(2):
        image = decoder(z)
        alone.inputs["z"].copy_(z / 2)
        alone.run()
        assert torch.equal(image, alone.outputs["image"].float())
    within = arena.untyped_storage()
    assert image.untyped_storage().data_ptr() == within.data_ptr() and image.dtype == torch.float32
    # Beside the arena, PyTorch's operators make each result once more.
    largest = max(y.nbytes for call in alone.calls for y in call.outputs)
    assert decoder.bytes == size + largest and decoder.shape == image.shape[1:]
