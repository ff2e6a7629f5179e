"""The job service for tests: one for a module, or one of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.job_service.server import Gate, Server


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Server]:
    """One of the test's own, that has had no jobs."""
    started = Server(tmp_path)
    try:
        yield started
    finally:
        started.close()
    assert started.errors.read_text() == ""


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """One that other tests use as well, each with jobs of its own."""
    yield shared_server
    said = shared_server.errors.read_text()
    shared_server.errors.write_text("")
    assert said == ""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()
