"""csrc/noise: Random123's known answers, the stated counter layout, and the distribution."""

import numpy as np
import pytest
from scipy import stats

from volcast import _core
from volcast.runtime.noise import request_noise

MAX32 = 0xFFFFFFFF
F64 = np.dtype("float64")


def ids(*values):
    return np.array(values, dtype=np.uint64)


# Random123's tests/kat_vectors, the lines "philox4x32 10": counter, key, answer.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MAX32] * 4, [MAX32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert _core.philox(counter, key) == answer


@pytest.mark.parametrize("numel", [1, 3, 4, 255, 256, 257, 1030])
def test_counter_layout_and_box_muller(numel):
    seed, sample, step = 0x123456789ABCDEF0, 0xFEDCBA9876543210, 7
    values = _core.normal(ids(seed), ids(sample), step, [numel], F64)[0]
    key = [seed & MAX32, seed >> 32]
    wanted = []
    for block in range((numel + 3) // 4):
        bits = np.array(_core.philox([block, step, sample & MAX32, sample >> 32], key), dtype=np.float64)
        u = (bits + 0.5) * 2.0**-32
        for radius, turn in ((u[0], u[1]), (u[2], u[3])):
            angle = 2 * np.pi * turn
            wanted += [np.sqrt(-2 * np.log(radius)) * np.array([np.cos(angle), np.sin(angle)])]
    # Two libraries' log, cos and sin: a few eps64 on values below 7.
    np.testing.assert_allclose(values, np.concatenate(wanted)[:numel], rtol=0, atol=1e-14)


def test_float32_is_the_rounded_double():
    arguments = (ids(1, 2), ids(0, 9), 3, [5, 7, 11])
    single, double = (_core.normal(*arguments, np.dtype(name)) for name in ("float32", "float64"))
    assert single.dtype == np.float32 and single.shape == (2, 5, 7, 11)
    np.testing.assert_array_equal(single, double.astype(np.float32))


def test_streams_do_not_depend_on_the_batch():
    seeds, samples = ids(5, 5, 6), ids(0, 1, 0)
    together = _core.normal(seeds, samples, 0, [4, 6], F64)
    for n in range(3):
        np.testing.assert_array_equal(
            together[n : n + 1],
            _core.normal(seeds[n : n + 1], samples[n : n + 1], 0, [24], F64).reshape(1, 4, 6),
        )
    assert len({row.tobytes() for row in together}) == 3


def test_distribution():
    count = 1 << 20
    z = _core.normal(ids(2024), ids(3), 1, [count], F64)[0]
    # Five standard errors of each moment of N(0, 1): 1, 2, 15 and 96 are the variances of z, z^2, z^3, z^4.
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(z**power) - mean) < 5 * np.sqrt(variance / count), power
    assert stats.kstest(z, "norm").pvalue > 1e-4
    # Neighbours, pairs of one Box-Muller draw and blocks are uncorrelated, and so are their squares.
    for lag in (1, 2, 4, 256):
        assert abs(np.mean(z[:-lag] * z[lag:])) < 5 / np.sqrt(count), lag
        assert abs(np.mean((z[:-lag] ** 2 - 1) * (z[lag:] ** 2 - 1))) < 5 * 2 / np.sqrt(count), lag


@pytest.mark.parametrize(
    "other", [(ids(1), ids(0), 0), (ids(0), ids(1), 0), (ids(0), ids(0), 1), (ids(1 << 32), ids(0), 0)]
)
def test_streams_are_independent(other):
    count = 1 << 16
    first = _core.normal(ids(0), ids(0), 0, [count], F64)[0]
    second = _core.normal(*other, [count], F64)[0]
    assert abs(np.mean(first * second)) < 5 / np.sqrt(count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([1]), ids(0), 0, [4], F64), r"\[normal\] seeds: got int64 \[1\], wanted uint64 \[1\]"),
        ((ids(1), ids(0, 1), 0, [4], F64), r"samples: got uint64 \[2\], wanted uint64 \[1\]"),
        ((ids(1), ids(0), 0, [0], F64), r"shape holds 0: need 1 or more"),
        ((ids(1), ids(0), 0, [4], np.dtype("float16")), r"dtype float16: need float32 or float64"),
    ],
)
def test_guards(arguments, message):
    with pytest.raises(ValueError, match=message):
        _core.normal(*arguments)


def test_the_noise_of_a_request():
    found = request_noise(7, range(3, 5), 2, (2, 3, 4))
    assert found.dtype == np.float32
    for sample, noise in zip((3, 4), found, strict=True):
        assert np.array_equal(noise, _core.normal(ids(7), ids(sample), 2, [2, 3, 4], np.dtype("f4"))[0])
