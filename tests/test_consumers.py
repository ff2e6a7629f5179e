"""Who shows a run of the command line: by name, several at once, and none that harms it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asupervise import NotSupportedError
from asupervise.exporters.loading import load_handler, of_extra
from asupervise.options import LaunchOptions, parse_options
from tests.conftest import ROOT, Run

PLUG_IN = """
import json, os, threading

class Mine:
    def __init__(self):
        self.kinds = []
    def handle(self, event):
        self.kinds.append(event.kind)
    def close(self):
        with open(os.environ["TOLD"], "w") as file:
            json.dump(self.kinds, file)

class Wrong(Mine):
    def handle(self, event):
        super().handle(event)
        raise LookupError("no luck")

class Hangs(Mine):
    def handle(self, event):
        threading.Event().wait()

def refuses():
    raise ConnectionError("nobody there")

def nothing():
    return 3

def needs_more(address):
    raise AssertionError
"""
NAMES = "Mine Wrong Hangs refuses nothing needs_more missing"
RUN = ["round_completed", "group_starting", "worker_started", "worker_exited", "group_ended",
       "run_ended"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with handlers is installed; returns the file that one writes at its end."""
    folder = tmp_path / "plugged"
    folder.mkdir()
    (folder / "the_handlers.py").write_text(PLUG_IN)
    info = folder / "the_handlers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: the-handlers\nVersion: 1\n")
    points = "".join(f"{name.lower()} = the_handlers:{name}\n" for name in NAMES.split())
    (info / "entry_points.txt").write_text(f"[asupervise.event_handlers]\n{points}")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def told(file: Path) -> list[str]:
    return [kind for kind in json.loads(file.read_text()) if kind != "resource_sample"]


# --- handlers by name -----------------------------------------------------------------------------


def test_a_handler_of_an_entry_point(run_cli: Run, plugged: Path) -> None:
    done = run_cli("--event-log-handler", "mine", "--no-python", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert told(plugged) == RUN


def test_torchs_variable_names_one_too(run_cli: Run, plugged: Path) -> None:
    done = run_cli("--no-python", "true", env={"PET_EVENT_LOG_HANDLER": "mine"})
    assert done.returncode == 0
    assert told(plugged) == RUN


def test_one_that_raises_harms_nobody_and_is_warned_of_once(run_cli: Run, plugged: Path) -> None:
    done = run_cli("--event-log-handler", "wrong", "--no-python", "true")
    assert done.returncode == 0
    assert done.stderr.decode().splitlines() == [
        "warning: --event-log-handler wrong: events could not be handled: LookupError: no luck"
    ]
    assert told(plugged) == RUN


def test_one_that_hangs_is_given_up(run_cli: Run, plugged: Path) -> None:
    done = run_cli("--event-log-handler", "hangs", "--no-python", "sh", "-c", "exit 3")
    assert done.returncode == 3
    (warning, *_) = done.stderr.decode().splitlines()
    # Seven, and samples of memory on a slow machine.
    pattern = r"warning: --event-log-handler hangs: \d+ events left out: too slow"
    assert re.fullmatch(pattern, warning)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no-such", "there is no event handler 'no-such'; known: console, hangs, mine, missing, "
         "needs_more, nothing, null, otel, prometheus, refuses, wrong"),
        ("refuses", "event handler 'refuses' (the_handlers:refuses): "
         "ConnectionError: nobody there"),
        ("nothing", "event handler 'nothing' (the_handlers:nothing): 3 has no method handle()"),
        ("missing", "event handler 'missing' (the_handlers:missing): AttributeError: module "
         "'the_handlers' has no attribute 'missing'"),
        ("needs_more", "event handler 'needs_more' (the_handlers:needs_more): TypeError: "
         "needs_more() missing 1 required positional argument: 'address'"),
    ],
)  # fmt: skip
def test_what_is_no_handler_is_one_clear_error(plugged: Path, name: str, error: str) -> None:
    with pytest.raises(NotSupportedError) as caught:
        load_handler(name)
    assert str(caught.value) == error


def test_it_is_said_before_anything_starts(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("--event-log-handler", "no-such", "--no-python", "touch", tmp_path / "started")
    assert done.stderr.decode().splitlines() == [
        "error: there is no event handler 'no-such'; known: console, null, otel, prometheus"
    ]
    assert done.returncode == 2
    assert not (tmp_path / "started").exists()


def test_the_one_to_the_console_is_torchs_in_json(run_cli: Run) -> None:
    done = run_cli("--event-log-handler", "console", "--no-python", "echo", "from a worker")
    assert done.stdout == b"from a worker\n"
    header, *events = map(json.loads, done.stderr.decode().splitlines())
    assert header["event"] == "header"
    assert [event["event"] for event in events] == RUN


def test_null_is_nobody(run_cli: Run) -> None:
    done = run_cli("--event-log-handler", "null", "--no-python", "true")
    assert (done.returncode, done.stderr) == (0, b"")


def test_several_at_once(run_cli: Run, plugged: Path, tmp_path: Path) -> None:
    done = run_cli("--event-log-handler", "mine,console,null,mine", "--events", tmp_path / "events",
                   "--metrics-port", 0, "--no-python", "true")  # fmt: skip
    assert done.returncode == 0
    metrics, *lines = done.stderr.decode().splitlines()
    assert metrics.startswith("asupervise: metrics: http://127.0.0.1:")
    assert told(plugged) == RUN
    assert [json.loads(line)["event"] for line in lines[1:]] == RUN
    in_file = (tmp_path / "events").read_text().splitlines()
    assert [json.loads(line)["event"] for line in in_file[1:]] == RUN


# --- who is wanted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", False),
        ("--event-log-handler null", False),
        ("--event-log-handler console", True),
        ("--event-log-handler null,mine", True),
        ("--events -", True),
        ("--metrics-port 0", True),
        ("--live", True),
    ],
)
def test_who_wants_to_hear_of_it(words: str, wanted: bool) -> None:
    options = parse_options([*words.split(), "x.py"], {})
    assert options.is_consumed is wanted
    assert LaunchOptions().is_consumed is False


def test_a_module_that_misses_another_one_says_which() -> None:
    def load() -> Callable[..., Any]:
        with of_extra("otel", "opentelemetry-api", "opentelemetry"):
            import no_such_module

            return no_such_module
        raise AssertionError

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load()
    assert "no_such_module" not in sys.modules
