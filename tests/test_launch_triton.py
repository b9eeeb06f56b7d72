from __future__ import annotations

import pytest
import torch
import triton

from volcast.benchmarks.kernel_cases import CASES
from volcast.kernels import group_norm
from volcast.kernels.impl import Impl, resolve_impl
from volcast.kernels.launch_triton import Launch, check_device

X = torch.zeros(1, 2, 2, 2, 8).movedim(-1, 1)


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    message = r"\[group_norm\] Tesla T4 has compute capability 7\.5: the fused kernels need 8\.0 or newer; pass impl='eager'"
    with pytest.raises(ValueError, match=message):
        check_device("group_norm", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_device("group_norm", torch.device("cuda"))


def test_a_fused_form_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    one = torch.ones(8)
    with pytest.raises(ValueError, match=r"impl='triton' with a tensor on cpu: .* or set TRITON_INTERPRET=1"):
        group_norm(X, 2, one, one, impl="triton")
    # Nothing fell back, and without a name the CPU has its own form.
    assert torch.equal(group_norm(X, 2, one, one), group_norm(X, 2, one, one, impl="eager"))


def test_forms_are_picked_by_device_or_name() -> None:
    assert resolve_impl("attention", None, X) is Impl.EAGER
    assert resolve_impl("attention", "eager", X) is Impl.EAGER
    with pytest.raises(ValueError, match=r"\[attention\] impl='cudnn': need one of eager, triton"):
        resolve_impl("attention", "cudnn", X)


def test_a_wanted_gradient_is_not_lost_silently() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"\[group_norm\] an input requires a gradient and impl='triton'"):
        group_norm(X, 2, weight, weight, impl="triton")
    with torch.no_grad():
        group_norm(X, 2, weight, weight, impl="triton")
    assert group_norm(X, 2, weight, weight, impl="eager").requires_grad


def test_no_kernel_is_compiled_anew_for_another_size() -> None:
    found = 0
    for case in CASES:
        for launch in case.launches(90):
            numbers = {name for name, value in launch.arguments.items() if isinstance(value, int | float)}
            special = set(launch.kernel.kwargs["do_not_specialize"])
            assert numbers <= special, launch.name
            found += 1
    assert found > len(CASES)


@pytest.mark.parametrize("grid", [(1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (0, 1, 1)])
def test_a_grid_that_cuda_refuses_is_named(grid: tuple[int, int, int]) -> None:
    def kernel() -> None: ...

    with pytest.raises(
        ValueError, match=r"\[kernel\] needs a grid of .* give fewer samples, heads or groups"
    ):
        Launch(kernel=kernel, grid=grid, arguments={})
