"""Which sizes are allowed, and which are nearest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volcast.runtime.sizes import check_size, nearest
from volcast.runtime.spec import Axis


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 12), st.integers(-5, 100))
def test_nearest_is_what_a_search_finds(minimum: int, length: int, multiple: int, size: int) -> None:
    axis = Axis(name="d0", minimum=minimum, maximum=minimum + length, multiple=multiple)
    allowed = [value for value in range(minimum, minimum + length + 1) if value % multiple == 0]
    found = nearest(axis, size)
    assert set(found) <= set(allowed) and bool(found) == bool(allowed)
    if allowed:
        assert min(abs(value - size) for value in allowed) in {abs(value - size) for value in found}
    if size in allowed:
        check_size("sample", axis, size)
    else:
        with pytest.raises(ValueError, match=f"d0={size}: need {minimum}"):
            check_size("sample", axis, size)
