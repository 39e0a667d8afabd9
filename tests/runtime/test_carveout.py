"""A kernel's wish for shared memory reaches the driver once."""

from types import SimpleNamespace

import pytest

from fusec.runtime import carveout


class Kernel:
    """As much of a loaded kernel as is looked at."""

    def __init__(self, function):
        self.function = function


@pytest.fixture
def calls(monkeypatch):
    found = []

    def set_attribute(function, attribute, value):
        found.append((function.value, attribute, value.value))
        return 0

    monkeypatch.setattr(carveout, "driver", lambda: SimpleNamespace(cuFuncSetAttribute=set_attribute))
    return found


def test_once_a_kernel(calls):
    attribute = carveout.PREFERRED_SHARED_MEMORY_CARVEOUT
    first, second = Kernel(7), Kernel(8)
    for kernel in (first, first, second):
        carveout.share_memory(kernel, 28)
    assert calls == [(7, attribute, 28), (8, attribute, 28)]
    carveout.share_memory(Kernel(7), 28)  # another one, at the address of one that is gone
    assert len(calls) == 3


def test_nothing_is_asked_for_without_a_kernel_or_a_wish(calls):
    carveout.share_memory(None, 28)
    carveout.share_memory(Kernel(7), None)
    assert calls == []


def test_a_refusal_is_no_secret(monkeypatch):
    monkeypatch.setattr(carveout, "driver", lambda: SimpleNamespace(cuFuncSetAttribute=lambda *_: 1))
    with pytest.raises(AssertionError, match="CUDA error 1"):
        carveout.share_memory(Kernel(9), 28)
