"""Processes that write files."""

import signal

import pytest

from sae_lens_maira.dashboards.writing import parallel_map


def refuse(_number, _frame):
    raise RuntimeError("the parent's handler ran in a child")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stop_after", [1, 8])
def test_children_end_although_the_parent_has_a_handler_that_raises(stop_after, capfd):
    """SAELens' runner leaves such a handler; a child that inherits it survives `Pool.terminate` and is waited for."""
    before = signal.signal(signal.SIGTERM, refuse)
    try:
        results = parallel_map(lambda n: n * n, range(8), workers=2)
        found = [next(results) for _ in range(stop_after)]
        results.close()  # also when the caller stops early
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [n * n for n in range(stop_after)]
    assert "handler ran" not in capfd.readouterr().err
