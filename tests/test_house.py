"""Who may import whom, what costs nothing at import, and what nobody does.

`ROOMS` is the table of docs/design.md as data. A new module gets a row here and one there.
"""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "asupervise"


@dataclass(frozen=True)
class Room:
    """What one module may import, beside the standard library.

    Attributes:
        rooms: modules of ours, anywhere in the file.
        lazily: modules of ours inside functions only.
        others: third-party packages.
        asynchronous: whether it may import asyncio.
    """

    rooms: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    asynchronous: bool = False


def room(
    rooms: str = "", *, lazily: str = "", others: str = "", asynchronous: bool = False
) -> Room:
    return Room(
        frozenset(rooms.split()), frozenset(lazily.split()), frozenset(others.split()), asynchronous
    )


ROOMS = {
    # Leaves, and what runs inside workers: the standard library is all that they may use.
    "errors": room(),
    "framing": room(),
    "procfs": room(),
    "newcomers": room("procfs"),
    "cgroups": room("procfs"),
    "failures": room("error_files", lazily="hints views.notebook views.plain"),
    "hints": room(),
    "ranges": room(),
    "report": room("error_files failures hints ranges"),
    "result": room("errors", lazily="failures report views.notebook"),
    "events": room(),
    "bus": room(lazily="events", asynchronous=True),
    "telling": room(
        "bus plan", lazily="_compat affinity binding failures handler memory result stacks"
    ),
    "error_handler": room(lazily="error_files worker"),
    "error_files": room(),
    "worker": room(),
    # Looking at the machine.
    "cpus": room(),
    "gpus": room(others="pynvml"),
    "topology": room("errors gpus ranges"),
    # Deciding what to start: no event loop.
    "environ": room(),
    "logs": room("errors"),
    "affinity": room("topology"),
    "placement": room("affinity errors topology"),
    "binding": room("affinity errors placement topology"),
    "spec": room("errors logs", lazily="binding formats functions.spec"),
    "plan": room("logs spec worker", lazily="binding"),
    "binder": room(
        "errors spec", lazily="_compat binding functions.memory_policy topology", asynchronous=True
    ),
    # Starting it, watching it, ending it.
    "_compat": room(asynchronous=True),
    "shielding": room(others="anyio", asynchronous=True),
    "handler": room("_compat plan procfs", asynchronous=True),
    "work": room("handler", lazily="functions.work plan spec"),
    "cleanup": room("newcomers procfs", lazily="cgroups handler", asynchronous=True),
    "guardian": room("_compat shielding", lazily="cgroups cleanup", asynchronous=True),
    "subreaper": room("procfs", asynchronous=True),
    "hang": room("handler procfs worker", asynchronous=True),
    "memory": room("procfs", others="psutil", asynchronous=True),
    "stacks": room("_compat handler procfs worker", asynchronous=True),
    "diagnosis": room(
        "_compat handler memory procfs",
        lazily="hang stacks telling",
        asynchronous=True,
    ),
    "files": room("plan worker", asynchronous=True),
    "postmortem": room("_compat error_files failures files handler work"),
    "collect": room(
        "files handler plan result work", lazily="failures postmortem", asynchronous=True
    ),
    # Showing what it says.
    "console": room("framing", asynchronous=True),
    "watches": room(others="asyncinotify", asynchronous=True),
    "pulses": room("handler hub telling watches worker", asynchronous=True),
    "recording": room("bus logs", lazily="events views.report", asynchronous=True),
    "exporters.__init__": room(),
    "exporters.handling": room("bus shielding", lazily="events", asynchronous=True),
    "exporters.lines": room("recording", lazily="events"),
    "exporters.loading": room("errors", lazily="exporters.handling"),
    "exporters.otel": room("events", others="opentelemetry"),
    "exporters.prometheus": room("events memory procfs", others="prometheus_client"),
    "exporters.scraping": room(others="prometheus_client", asynchronous=True),
    "views.__init__": room(),
    "views.plain": room(),
    "views.markup": room("views.plain"),
    "views.lives": room("events"),
    "views.story": room("events views.lives"),
    "views.files": room("views.lives views.story"),
    "views.rundir": room("error_files errors events procfs views.files views.lives views.story"),
    "views.words": room("hints views.lives"),
    "views.happenings": room("events hints views.plain views.story views.words"),
    "views.summary": room("hints views.lives views.markup views.plain views.story views.words"),
    "views.timeline": room(
        "views.happenings views.lives views.markup views.plain views.story views.words"
    ),
    "views.resources": room("views.lives views.markup views.story views.timeline views.words"),
    "views.ranks": room(
        "views.lives views.markup views.plain views.story views.summary views.words"
    ),
    "views.excerpts": room("views.files views.markup views.plain views.words"),
    "views.stamps": room(),
    "views.loglines": room("views.files views.plain views.stamps"),
    "views.printing": room("views.files views.live.text views.loglines views.plain views.words"),
    "views.following": room(
        "events views.files views.lives views.loglines views.plain views.rundir"
        " views.story watches",
        asynchronous=True,
    ),
    "views.show": room(
        "hints views.happenings views.lives views.plain views.story views.summary views.words"
    ),
    "view": room(
        "errors views.files views.following views.loglines views.plain views.printing"
        " views.report views.rundir views.show views.story",
        asynchronous=True,
    ),
    "views.notebook": room("views.lives views.markup views.plain views.summary views.words"),
    "views.report": room(
        "events views.excerpts views.files views.happenings views.lives views.markup"
        " views.plain views.ranks views.resources views.rundir views.story views.summary"
        " views.timeline views.words"
    ),
    "views.live.__init__": room(),
    "views.live.rows": room(),
    "views.live.board": room("events views.live.rows"),
    "views.live.text": room("views.plain"),
    "views.live.spans": room("views.live.rows", others="rich"),
    "views.live.columns": room("views.live.text views.live.rows views.live.spans", others="rich"),
    "views.live.layout": room(
        "views.live.columns views.live.text views.live.rows views.live.spans", others="rich"
    ),
    "views.live.painting": room("views.live.rows views.live.spans", others="rich"),
    "views.live.last_lines": room(),
    "views.live.gpu_use": room(lazily="gpus", others="pynvml"),
    "views.live.pipes": room("procfs"),
    "views.live.tty": room("views.live.pipes views.live.rows"),
    "views.live.above": room("views.live.text"),
    "views.live.canvas": room(
        "views.live.painting views.live.rows views.live.spans views.live.tty"
    ),
    "views.live.driving": room(
        "bus events views.live.above views.live.board views.live.canvas views.live.gpu_use"
        " views.live.last_lines"
        " views.live.layout views.live.painting views.live.rows views.live.spans"
        " views.live.tty",
        asynchronous=True,
    ),
    "views.live.view": room(
        "bus errors formats shielding views.live.tty",
        lazily="views.live.above views.live.board views.live.driving views.live.gpu_use"
        " views.live.painting views.live.spans",
        asynchronous=True,
    ),
    "sinks": room("framing", asynchronous=True),
    "growing": room(others="aiofiles"),
    "tracebacks": room(),
    "tailing": room("framing growing sinks tracebacks watches", asynchronous=True),
    "formats": room("ranges"),
    "format_framers": room("formats framing whole_lines"),
    "dedup": room(),
    "merging": room(
        "console dedup format_framers formats framing sinks whole_lines",
        others="anyio",
        asynchronous=True,
    ),
    "showing": room("console framing plan sinks", lazily="format_framers formats merging"),
    "hub": room("console watches", asynchronous=True),
    "streaming": room(
        "framing hub plan showing tailing",
        lazily="formats merging",
        others="anyio",
        asynchronous=True,
    ),
    "whole_lines": room("framing"),
    "lines": room("framing hub logs plan sinks tailing whole_lines", asynchronous=True),
    "functions.__init__": room(),
    "functions.frames": room(),
    "functions.running": room(
        "error_handler functions.frames", others="cloudpickle", asynchronous=True
    ),
    "functions.bootstrap": room("functions.running"),
    "functions.memory_policy": room(),
    "functions.witness": room(),
    "functions.zygote_main": room(
        "functions.running functions.witness worker", lazily="functions.memory_policy"
    ),
    "functions.interpreter": room("errors"),
    "functions.spec": room("functions.bootstrap functions.interpreter"),
    "functions.payload": room("errors functions.frames functions.running", others="cloudpickle"),
    "functions.environment": room("errors"),
    "functions.results": room("functions.frames", asynchronous=True),
    "functions.forked": room("_compat procfs", asynchronous=True),
    "functions.zygote": room(
        "_compat cleanup errors functions.environment functions.forked"
        " functions.interpreter functions.payload functions.zygote_main guardian handler"
        " plan procfs shielding",
        asynchronous=True,
    ),
    "functions.work": room(
        "_compat functions.environment functions.payload functions.results functions.spec"
        " functions.zygote handler plan"
    ),
    # One group on one node.
    "context": room(
        "_compat bus cgroups cleanup collect diagnosis errors files guardian"
        " handler logs plan procfs recording result shielding spec subreaper telling"
        " work",
        lazily="formats lines pulses stacks streaming views.notebook",
        asynchronous=True,
    ),
    "procs": room(
        "binder context files logs plan spec work",
        lazily="binding bus formats functions.zygote",
    ),
    "elastic.__init__": room(),
    "elastic.interruption": room(),
    "elastic.engine": room("errors"),
    "elastic.telling": room("bus elastic.records", lazily="failures result"),
    "elastic.records": room("errors"),
    "elastic.decide": room("elastic.records"),
    "elastic.culprits": room("elastic.records error_files failures"),
    "elastic.values": room("elastic.decide"),
    "elastic.ports": room(),
    "elastic.watchdog": room(
        "_compat procfs shielding",
        lazily="context elastic.rendezvous.Rendezvous",
        asynchronous=True,
    ),
    "elastic.watchdog_main": room("cgroups procfs"),
    "elastic.gate": room(
        "elastic.ports errors",
        lazily="elastic.records gpus result",
        others="pynvml",
        asynchronous=True,
    ),
    "elastic.board": room("elastic.engine elastic.records", asynchronous=True),
    "elastic.leading": room(
        "elastic.board elastic.decide elastic.engine elastic.records", asynchronous=True
    ),
    "elastic.coordinator": room(
        "elastic.board elastic.decide elastic.engine elastic.interruption elastic.leading"
        " elastic.records elastic.watchdog",
        asynchronous=True,
    ),
    "elastic.replay": room("elastic.engine elastic.records"),
    "elastic.log_engine": room("elastic.engine elastic.records elastic.replay", asynchronous=True),
    "elastic.store_log": room(
        "elastic.engine elastic.log_engine elastic.replay", asynchronous=True
    ),
    "elastic.rendezvous.__init__": room("elastic.decide elastic.interruption elastic.records"),
    "elastic.rendezvous.static": room(
        "elastic.decide elastic.interruption elastic.records elastic.rendezvous.Request",
        asynchronous=True,
    ),
    "elastic.rendezvous.hostlist": room(),
    "elastic.rendezvous.variables": room("errors"),
    "elastic.rendezvous.schedulers": room(
        "elastic.rendezvous.hostlist elastic.rendezvous.variables"
    ),
    "elastic.rendezvous.env": room(
        "elastic.rendezvous.Request elastic.rendezvous.schedulers elastic.rendezvous.static flags",
        asynchronous=True,
    ),
    "elastic.rendezvous.etcd_calls": room("elastic.engine", others="aetcd grpc", asynchronous=True),
    "elastic.rendezvous.etcd_engine": room(
        "elastic.engine elastic.rendezvous.etcd_calls", asynchronous=True
    ),
    "elastic.rendezvous.etcd": room(
        "elastic.coordinator elastic.engine elastic.rendezvous.Request"
        " elastic.rendezvous.etcd_engine elastic.values"
    ),
    "elastic.rendezvous.c10d": room(
        "elastic.coordinator elastic.engine elastic.log_engine elastic.records"
        " elastic.rendezvous.Request elastic.store_log elastic.values",
        others="psutil torch",
        asynchronous=True,
    ),
    "elastic.agent": room(
        "context elastic.gate elastic.interruption elastic.ports elastic.records"
        " elastic.rendezvous.Rendezvous elastic.telling elastic.watchdog errors"
        " result shielding",
        lazily="elastic.culprits failures signals",
        asynchronous=True,
    ),
    "elastic.blueprint": room("elastic.agent environ logs"),
    "elastic.intensity": room("elastic.decide"),
    "elastic.alone": room(
        "bus cleanup context files handler logs plan spec telling work",
        asynchronous=True,
    ),
    "elastic.keeping": room(
        "bus elastic.alone elastic.intensity error_files errors failures files"
        " logs recording result shielding spec telling",
        lazily="lines stacks views.notebook",
        asynchronous=True,
    ),
    "elastic.services": room(
        "binder elastic.alone elastic.decide elastic.intensity elastic.keeping logs procs spec",
        lazily="binding bus formats functions.zygote",
    ),
    "elastic.node": room(
        "elastic.agent elastic.ports elastic.records elastic.rendezvous.Request",
        lazily="binding topology",
    ),
    "elastic.running": room(
        "bus elastic.agent elastic.blueprint elastic.gate elastic.ports"
        " elastic.rendezvous.Opener elastic.rendezvous.Request elastic.telling"
        " errors procs recording shielding",
        lazily="elastic.node elastic.services signals",
    ),
    "elastic.meeting": room(
        "elastic.node elastic.records elastic.rendezvous.Request elastic.values flags options",
        lazily="elastic.rendezvous.env elastic.rendezvous.schedulers",
    ),
    "elastic.config": room(
        "elastic.decide elastic.records elastic.values flags",
        lazily="binding formats functions.zygote logs",
    ),
    "elastic.launching": room(
        "bus elastic.agent elastic.blueprint elastic.config elastic.culprits"
        " elastic.meeting elastic.node elastic.rendezvous.Request elastic.running"
        " errors failures logs result",
    ),
    # The command line. What it does not need to say "usage: ..." it imports when it does.
    "flags": room(),
    "options": room("errors flags"),
    "job": room(
        "cpus elastic.blueprint elastic.meeting elastic.node elastic.rendezvous.Request"
        " environ options",
        lazily="binding formats logs procs ranges topology",
    ),
    "dryrun": room("job plan", lazily="binding"),
    "signals": room(asynchronous=True),
    "consumers": room(
        "bus exporters.handling options",
        lazily="exporters.lines exporters.loading exporters.otel exporters.prometheus"
        " exporters.scraping signals views.live.view",
    ),
    "cli": room(
        "errors options",
        lazily="bus consumers dryrun elastic.agent elastic.launching elastic.node elastic.records"
        " elastic.running error_handler failures job procs report result signals",
        asynchronous=True,
    ),
    "__main__": room("cli"),
    # Names only: resolved at first use.
    "__init__": room(),
}

# `from asupervise import record` in a worker, however many workers there are.
WORKER_SIDE = (
    "errors", "error_files", "failures", "error_handler", "worker",
    "functions.bootstrap", "functions.running", "functions.zygote_main",
)  # fmt: skip
HEAVY = {"anyio", "aiofiles", "argparse", "asyncio", "asyncinotify", "psutil", "subprocess"}
# Decisions only: they take what was read, and return what is to be done.
PURE = (
    "errors", "framing", "whole_lines", "tracebacks", "formats", "format_framers", "dedup",
    "ranges", "report", "affinity", "placement", "binding", "hints",
    "views.plain", "views.markup", "views.lives", "views.story", "views.words",
    "views.happenings", "views.summary", "views.timeline", "views.resources", "views.ranks",
    "views.stamps", "views.printing", "views.show", "views.notebook",
)  # fmt: skip
COMMAND_LINE = ("flags", "options", "job", "dryrun", "cli", "__main__", "view")
# What an application must ask for by name, and what is a process of its own.
ASKED_FOR = ("signals", "subreaper", "functions.zygote_main")


# --- reading the source -------------------------------------------------------------------------


def modules() -> list[str]:
    """Their names below the package, dotted where they stand in a folder."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in paths)


@cache
def tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(), filename=str(path))


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool
    for_types: bool


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(module: str) -> Iterator[Import]:
    """Every import in a module: ours as ``asupervise.name``, the others by their top name."""

    def walk(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in targets(child):
                    yield Import(target, child.lineno, lazy, for_types)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, lazy or inside, for_types or is_for_types(child))

    return walk(tree(module), lazy=False, for_types=False)


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        full_names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
        full_names = [str(node.module)]
        if PACKAGE.joinpath(*str(node.module).split(".")[1:]).is_dir() and is_ours(
            str(node.module)
        ):
            # `from asupervise import procfs` names a module. The version is everybody's; other
            # public names have a home, to be imported from there.
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            full_names = [f"{node.module}.{name}" for name in names]
    return [name if is_ours(name) else top(name) for name in full_names]


def top(name: str) -> str:
    return name.split(".")[0]


def is_ours(name: str) -> bool:
    return top(name) == "asupervise"


def our_imports(module: str) -> list[Import]:
    # `import asupervise` alone is for its version: it loads nothing.
    return [found for found in imports(module) if found.target.startswith("asupervise.")]


def room_of(module: str) -> Room:
    # A module without a row fails in one test, not in each.
    return ROOMS.get(module, Room())


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


every_module = pytest.mark.parametrize("module", modules())


# --- the table ----------------------------------------------------------------------------------


@every_module
def test_each_module_has_a_room(module: str) -> None:
    assert module in ROOMS, (
        f"asupervise/{module}.py is in no table: give it a row in docs/design.md and in ROOMS"
    )


def test_each_room_has_a_module() -> None:
    assert set(ROOMS) <= set(modules())


@every_module
def test_imports_of_ours_are_those_of_the_table(module: str) -> None:
    allowed = room_of(module)
    for found in our_imports(module):
        name = found.target.partition(".")[2]
        if module == "__init__" and found.for_types:
            continue
        where = f"asupervise/{module}.py:{found.line}"
        assert name in allowed.rooms | allowed.lazily, f"{where} imports {name!r}: not in the table"
        in_function = found.lazy or found.for_types
        assert name in allowed.rooms or in_function, f"{where} may import {name!r} lazily only"


@every_module
def test_third_party_imports_are_those_of_the_table(module: str) -> None:
    for found in imports(module):
        if found.target.split(".")[
            0
        ] != "asupervise" and found.target not in sys.stdlib_module_names | {"_pickle"}:
            where = f"asupervise/{module}.py:{found.line}"
            allowed = room_of(module).others
            assert found.target in allowed, f"{where} imports {found.target!r}"


@every_module
def test_asyncio_stays_in_its_rooms(module: str) -> None:
    used = [found for found in imports(module) if found.target == "asyncio"]
    assert room_of(module).asynchronous or not used, f"asupervise/{module}.py imports asyncio"


def test_there_are_no_circles() -> None:
    graph = {
        module: {found.target.partition(".")[2] for found in our_imports(module)}
        for module in modules()
        if module != "__init__"  # everything, at first use
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_docs_have_the_same_table() -> None:
    rows = dict(documented_rooms())
    assert set(rows) == set(ROOMS)
    for name, documented in rows.items():
        assert documented == ROOMS[name].rooms | ROOMS[name].lazily, f"docs/design.md: {name}.py"


def documented_rooms() -> Iterator[tuple[str, frozenset[str]]]:
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        if re.match(r"\| `[\w/]+\.py` \|", line):
            name, _, may_import, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            module = name.strip("`").removesuffix(".py").replace("/", ".")
            yield module, frozenset(re.findall(r"`([\w.]+)`", may_import))


# --- what nobody does ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", PURE)
def test_pure_rooms_do_no_input_or_output(module: str) -> None:
    forbidden = {"subprocess", "socket", "shutil", "tempfile", "pathlib"}
    assert forbidden.isdisjoint(found.target for found in imports(module))
    for name, call in calls(module):
        assert name not in {"open", "os.open", "os.listdir", "os.scandir", "os.stat", "print"}, (
            f"asupervise/{module}.py:{call.lineno} calls {name}"
        )


@every_module
def test_nobody_naps(module: str) -> None:
    """A wait is woken by an event. A sleep of a fixed length, but 0, is a poll."""
    for name, call in calls(module):
        if name.split(".")[-1] != "sleep" or not call.args:
            continue
        nap = call.args[0]
        assert not isinstance(nap, ast.Constant) or nap.value == 0, (
            f"asupervise/{module}.py:{call.lineno} sleeps for {ast.unparse(nap)} s"
        )


@pytest.mark.parametrize(
    "module", [name for name in modules() if name not in COMMAND_LINE + ASKED_FOR]
)
def test_the_host_keeps_its_signals_and_its_stdout(module: str) -> None:
    for name, call in calls(module):
        where = f"asupervise/{module}.py:{call.lineno}"
        last = name.split(".")[-1]
        assert name != "signal.signal", f"{where} installs a signal handler"
        assert last != "add_signal_handler", f"{where} installs a signal handler"
        to_stderr = any(keyword.arg == "file" for keyword in call.keywords)
        assert name != "print" or to_stderr, f"{where} prints"
    assert "argparse" not in {found.target for found in imports(module)}


# --- what an import costs -----------------------------------------------------------------------


def run_python(program: str, *options: str) -> str:
    argv = [sys.executable, *options, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_record_is_cheap_to_import() -> None:
    loaded = run_python("import sys; from asupervise import record; print(*sys.modules)").split()
    assert HEAVY.isdisjoint(loaded)
    assert "asupervise.failures" not in loaded


@pytest.mark.parametrize("module", WORKER_SIDE)
def test_worker_side_needs_the_standard_library_only(module: str) -> None:
    """Run without site-packages, where nothing but the standard library can be imported."""
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    loaded = run_python(f"{path}; import asupervise.{module}; print(*sys.modules)", "-I", "-S")
    assert HEAVY.isdisjoint(loaded.split())


def test_a_plain_run_loads_nothing_of_those_who_show_it() -> None:
    """Events are told, and kept as they are: who shows them is imported where that is wanted."""
    program = "import sys; from asupervise.cli import main; main(['--no-python', 'true'])"
    loaded = run_python(f"{program}; print(*sys.modules)").split()
    consumers = {"asupervise.events", "asupervise.pulses", "asupervise.consumers", "json"}
    assert consumers.isdisjoint(loaded)
    folders = ("asupervise.exporters", "asupervise.views", "opentelemetry", "prometheus_client")
    assert [name for name in loaded if name.startswith(folders)] == []


SIDE_EFFECTS = """
import json, logging, os, signal, sys, threading
import asyncio, importlib, warnings

def state():
    return {
        "environment": dict(os.environ),
        "signals": {int(sig): str(signal.getsignal(sig)) for sig in signal.valid_signals()},
        "logging": [str(logging.root.handlers), logging.root.level],
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "policy": str(asyncio.events._event_loop_policy),
        "filters": len(warnings.filters),
        "path": sys.path,
    }

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


def test_imports_have_no_side_effects() -> None:
    names = [f"asupervise.{name}" for name in modules() if name not in ("__main__", "__init__")]
    argv = [sys.executable, "-c", SIDE_EFFECTS, "asupervise", *names]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
    assert done.stderr == ""


# --- the public names ---------------------------------------------------------------------------


def test_every_public_name_resolves() -> None:
    import asupervise

    for name in asupervise.__all__:
        assert getattr(asupervise, name) is not None
    assert len(set(asupervise.__all__)) == len(asupervise.__all__)
    assert set(asupervise.__all__) <= set(dir(asupervise))


def test_type_checkers_see_the_same_names() -> None:
    import asupervise

    shown = {
        alias.asname
        for block in ast.walk(tree("__init__"))
        if is_for_types(block)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == set(asupervise.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import asupervise

    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = asupervise.no_such_name
