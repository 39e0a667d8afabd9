"""A kernel's wish for shared memory reaches the driver once."""

from types import SimpleNamespace

import pytest

from fusec.runtime import carveout


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def set_attribute(function, attribute, value):
        calls.append((function.value, attribute, value.value))
        return 0

    carveout.ask.cache_clear()
    monkeypatch.setattr(carveout, "driver", lambda: SimpleNamespace(cuFuncSetAttribute=set_attribute))
    yield calls
    carveout.ask.cache_clear()


def test_once_a_kernel(asked):
    for function in (7, 7, 8):
        carveout.share_memory(SimpleNamespace(function=function), 28)
    assert asked == [(7, carveout.PREFERRED_SHARED_MEMORY_CARVEOUT, 28), (8, carveout.PREFERRED_SHARED_MEMORY_CARVEOUT, 28)]


def test_nothing_is_asked_for_without_a_kernel_or_a_wish(asked):
    carveout.share_memory(None, 28)
    carveout.share_memory(SimpleNamespace(function=7), None)
    assert asked == []


def test_a_refusal_is_no_secret(asked, monkeypatch):
    monkeypatch.setattr(carveout, "driver", lambda: SimpleNamespace(cuFuncSetAttribute=lambda *_: 1))
    with pytest.raises(AssertionError, match="CUDA error 1"):
        carveout.share_memory(SimpleNamespace(function=9), 28)
