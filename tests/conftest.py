"""Shared fixtures: golden files, and what every test may rely on."""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write what the tests produce over the golden files")


def pytest_configure(config):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FUSEC_NO_CACHE", "1")  # what a test runs is compiled by the compiler under test


@pytest.fixture
def golden(request):
    """golden(path, text): `text` must equal the file, which --update-golden rewrites. Paths are relative to the test's folder."""

    def check(path, text: str):
        file = Path(request.path).parent / path
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        assert file.exists(), f"{file} is missing; run pytest --update-golden and read what it writes"
        assert text == file.read_text(encoding="utf-8"), f"{file} differs; if that is meant, run pytest --update-golden"

    return check
