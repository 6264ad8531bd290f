"""Work ahead of its use comes out in order, whatever its threads and however long each piece takes."""

import threading
import time
from functools import partial

import pytest
import torch

from sae_lens_maira.activations.prefetch import LARGE, BatchMemory, empty_rows, prefetch


def slow(number, seconds):
    time.sleep(seconds)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_keep_their_order(workers):
    jobs = [partial(slow, i, 0.02 if i % 3 == 0 else 0.0) for i in range(12)]
    assert list(prefetch(jobs, workers)) == list(range(12))


def test_no_more_is_taken_than_there_is_room_for():
    """With two threads at most four results wait while the caller holds one."""
    taken = []

    def jobs():
        for i in range(50):
            taken.append(i)
            yield partial(slow, i, 0.0)

    results = prefetch(jobs(), 2)
    assert next(results) == 0
    assert len(taken) == 5
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_place_and_no_thread_stays(workers):
    def fail():
        raise ValueError("the third")

    results = prefetch([partial(slow, 0, 0.01), partial(slow, 1, 0.0), fail, partial(slow, 3, 0.0)], workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="third"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("rows", [1, LARGE // 4096])
def test_memory_can_be_written_and_outlives_its_making(rows):
    """Small and large pieces alike hold what is written to them."""
    memory = empty_rows(rows, 1024, torch.float32)
    assert memory.shape == (rows, 1024)
    memory.fill_(3.0)
    assert float(memory.sum()) == 3 * 1024 * rows


def test_memory_comes_back_only_when_no_view_lives():
    """A dropped tensor's memory is taken again; that of one of which a view is held, however small, is not."""
    memory = BatchMemory(LARGE // 4096, 1024, torch.float32)
    first = memory.empty()
    place = first.data_ptr()
    del first
    second = memory.empty()
    assert second.data_ptr() == place
    view = second.fill_(1.0)[3:4, :2].T
    del second
    others = [memory.empty().fill_(7.0) for _ in range(5)]
    assert place not in {other.data_ptr() for other in others}
    assert len({other.data_ptr() for other in others}) == 5
    assert view.tolist() == [[1.0], [1.0]]
    del view
    assert memory.empty().data_ptr() == place
