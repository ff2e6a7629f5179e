"""The command line's flags, as a table, and how the text of each value is read.

Pure. A reader of a value raises ValueError with what was expected; `options` adds which flag or
variable the text came from.
"""

import math
import re
import signal
from collections.abc import Callable
from typing import Any, Final, NamedTuple

__all__ = ["FLAGS", "NPROC_WORDS", "Flag", "split_endpoint"]

# --- the text of a value -> the value --------------------------------------------------------

NPROC_WORDS: Final = ("auto", "cpu", "gpu", "xpu")
_HOST: Final = r"[\w.:%-]+"
_CANNOT_BE_HANDLED: Final = ("SIGKILL", "SIGSTOP", "SIGCHLD")


def _integer(text: str, expected: str, low: int, high: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    if not low <= value <= high:
        raise ValueError(f"expected {expected}")
    return value


def _worker_count(text: str) -> int | str:
    if text in NPROC_WORDS:
        return text
    return _integer(text, f"a number of at least 1, or one of {', '.join(NPROC_WORDS)}", 1)


def _port(text: str) -> int:
    return _integer(text, "a port from 0 (any free one) to 65535", 0, 65535)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("expected a number of seconds, 0 or more")
    return value


def _seconds_above_zero(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise ValueError("expected a number of seconds above 0")
    return value


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text

    return parse


def _rank_or_none(text: str) -> int | None:
    return None if text == "none" else _integer(text, "a local rank, or none", 0)


def _ranks(text: str) -> frozenset[int]:
    expected = "local ranks with commas between them, such as 0,2,3"
    return frozenset(_integer(part, expected, 0) for part in text.split(","))


def _list_of_texts(text: str) -> tuple[str, ...]:
    # A doubled comma stands for one; a NUL cannot be part of an argument or a variable.
    parts = text.replace(",,", "\0").split(",")
    return tuple(part.replace("\0", ",") for part in parts if part)


def _signals(text: str) -> tuple[signal.Signals, ...]:
    return tuple(dict.fromkeys(_signal(name.strip().upper()) for name in text.split(",")))


def _signal(name: str) -> signal.Signals:
    full = name if name.startswith("SIG") else f"SIG{name}"
    if full not in signal.Signals.__members__:
        raise ValueError(
            f"there is no signal {name!r}; expected names with commas between them, such as "
            "SIGTERM,SIGUSR1"
        )
    if full in _CANNOT_BE_HANDLED:
        raise ValueError(f"{full} cannot be handled")
    return signal.Signals[full]


def _run_id(text: str) -> str:
    if not text or "/" in text:
        raise ValueError("expected a name without a slash: the run's log folder is named after it")
    return text


def _host(text: str) -> str:
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not re.fullmatch(_HOST, host):
        raise ValueError("expected a host name, an IPv4 address or an IPv6 address")
    return host


def split_endpoint(text: str) -> tuple[str, int | None]:
    """Host and port of ``HOST:PORT``; None for a port that is not there.

    Raises:
        ValueError: for what is no endpoint.
    """
    whole = text.strip()
    host, colon, port = ("", "", "") if whole.endswith("]") else whole.rpartition(":")
    try:
        return (_host(host), _port(port)) if colon else (_host(whole), None)
    except ValueError:
        raise ValueError("expected HOST:PORT, with brackets around an IPv6 address") from None


def _endpoints(text: str) -> str:
    for part in text.split(","):
        split_endpoint(part.strip().removeprefix("http://").removeprefix("https://").rstrip("/"))
    return text.strip()


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.partition("=") for part in text.split(",") if text.strip()]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise ValueError("expected KEY=VALUE pairs with commas between them")
    return tuple((key.strip(), value.strip()) for key, _, value in pairs)


def _node_count(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        fewest = int(low)
        most = int(high) if colon else fewest
    except ValueError:
        fewest = most = 0
    if not 1 <= fewest <= most:
        raise ValueError("expected a number of at least 1, or MIN:MAX with MIN not above MAX")
    return fewest, most


def _count(text: str) -> int:
    return _integer(text, "a number of at least 0", 0)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError("expected names with commas between them")
    return names


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a file")
    return text


def _metrics_port(text: str) -> tuple[str, int]:
    if text.strip().isascii() and text.strip().isdigit():
        return "127.0.0.1", _port(text)
    try:
        host, port = split_endpoint(text)
    except ValueError:
        port = None
    if port is None:
        raise ValueError("expected a port from 0 (any free one) to 65535, or HOST:PORT")
    return host, port


# --- the flags -------------------------------------------------------------------------------


class Flag(NamedTuple):
    """One flag of the command line.

    Attributes:
        name: its spelling with dashes; the one with underscores is understood as well.
        help: what it does.
        read: makes a value of its text; None for a switch, which has no value.
        metavar: what `--help` calls the value.
        short: its one-letter spelling.
        ours: whether torchrun is without it; then its abbreviations yield to those of torchrun.
        variable: where neither the flag nor `PET_<FIELD>` is given, this variable is looked at.
        negates: the field that a switch sets to False, where it sets none to True.
    """

    name: str
    help: str
    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    short: str | None = None
    ours: bool = False
    variable: str | None = None
    negates: str | None = None

    @property
    def field(self) -> str:
        """The field of `LaunchOptions` that it sets."""
        return self.negates or self.name[2:].replace("-", "_")


# By heading. Values are read in this order: a backend is refused before its endpoint is.
FLAGS: Final[dict[str, tuple[Flag, ...]]] = {
    "Workers": (
        Flag(
            "--nproc-per-node",
            "How many workers: a number; cpu: one for each CPU that we may use; gpu, xpu: one for "
            "each that is visible; auto: one for each GPU, or else for each CPU (default: 1).",
            _worker_count,
            "N|WORD",
        ),
        Flag("--module", "SCRIPT is a module, run as 'python -m' runs it.", short="-m"),
        Flag("--no-python", "SCRIPT is a program, run without Python."),
        Flag(
            "--run-path",
            "Run SCRIPT with runpy.run_path(), in the Python that runs this command, and record "
            "its exceptions for the report. Overrides --module and --no-python.",
        ),
        Flag("--role", "The workers' role (default: default).", str, "NAME"),
        Flag(
            "--stdin",
            "The local rank that reads our standard input; the others read nothing (default: 0).",
            _rank_or_none,
            "RANK|none",
            ours=True,
        ),
        Flag(
            "--virtual-local-rank",
            "Show each worker its own GPU only, and tell it LOCAL_RANK=0.",
        ),
    ),
    "Logs": (
        Flag(
            "--log-dir",
            "Keep logs here, each run in a folder of its own (default: a temporary folder, kept "
            "after a failure).",
            str,
            "DIR",
        ),
        Flag(
            "--redirects",
            "What goes to files and not to the console. 0: nothing, 1: stdout, 2: stderr, 3: both; "
            "or by local rank, as in 0:3,1:2 (default: 0).",
            str,
            "MASK",
            short="-r",
        ),
        Flag(
            "--tee",
            "What goes to files and to the console, each line with its prefix; a mask as above "
            "(default: 0).",
            str,
            "MASK",
            short="-t",
        ),
        Flag(
            "--local-ranks-filter",
            "Show these local ranks on the console, as in 0,2; files are written for all.",
            _ranks,
            "RANKS",
        ),
        Flag(
            "--duplicate-stdout-filters",
            "Copy all ranks' stdout lines that hold one of these texts to filtered_stdout.log. "
            "Texts have commas between them; ',,' stands for a comma.",
            _list_of_texts,
            "TEXTS",
        ),
        Flag(
            "--duplicate-stderr-filters",
            "The same of stderr, to filtered_stderr.log.",
            _list_of_texts,
            "TEXTS",
        ),
        Flag(
            "--log-line-prefix-template",
            "Prefix of a teed line, with ${role_name}, ${rank} and ${local_rank} filled in; also "
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE (default: [${role_name}${local_rank}]:).",
            str,
            "TEXT",
            ours=True,
            variable="TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE",
        ),
        Flag(
            "--color",
            "Colour the prefix of each line by rank. auto: on a terminal, unless NO_COLOR is set; "
            "always; never (default: auto).",
            _choice("auto", "always", "never"),
            "WHEN",
            ours=True,
        ),
        Flag("--timestamps", "Show before each teed line when it was read.", ours=True),
        Flag(
            "--log-format",
            "How teed lines look. text: with their prefix; json: an object each, with time, rank, "
            "local_rank, stream, group and text (default: text).",
            _choice("text", "json"),
            "FORMAT",
            ours=True,
        ),
        Flag(
            "--dedup",
            "Show a teed line that several ranks say within a moment once, with all of them in "
            "its prefix, as in [default0-6,9]:. Files are never changed.",
            ours=True,
        ),
        Flag(
            "--no-report",
            "Leave neither events.jsonl nor report.html in the run's folder.",
            ours=True,
            negates="report",
        ),
        Flag(
            "--live",
            "Show a table of all ranks at the end of the terminal, with the log scrolling above "
            "it: state, CPU, memory, progress (asupervise.progress), last line. Streams that would "
            "go straight to the console are teed. Without a terminal there are only lines. Needs "
            "the extra ui.",
            ours=True,
        ),
        Flag(
            "--logs-specs",
            "Leave files and console to the LogsSpecs of this entry point (group "
            "asupervise.logs_specs or torchrun.logs_specs).",
            str,
            "NAME",
        ),
    ),
    "Binding to CPUs and memory": (
        Flag(
            "--numa-binding",
            "Bind each worker to the CPUs near its GPU; without GPUs, spread the workers. node: a "
            "NUMA node's CPUs; socket: a socket's; exclusive: a share of a node's cores of its "
            "own; core-complex: the cores of one shared cache.",
            _choice("node", "socket", "exclusive", "core-complex"),
            "MODE",
        ),
        Flag(
            "--memory-binding",
            "Where a bound worker's memory comes from: local, preferred, interleave or none.",
            _choice("none", "local", "preferred", "interleave"),
            "POLICY",
            ours=True,
        ),
        Flag(
            "--numa-binding-fallback",
            "Where binding is not possible, run unbound instead of refusing.",
            ours=True,
        ),
    ),
    "Signals and shutdown": (
        Flag(
            "--signals-to-handle",
            "Signals that end the job: the first one is forwarded to the workers, a second one "
            "kills them (default: SIGTERM,SIGINT,SIGHUP,SIGQUIT).",
            _signals,
            "NAMES",
        ),
        Flag(
            "--shutdown-timeout",
            "How long workers may take to end before they are killed; also "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT (default: 30).",
            _seconds,
            "SECONDS",
            variable="TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        ),
        Flag(
            "--forward-signals",
            "Signals that are passed on to the workers and end nothing, as in SIGUSR1,SIGUSR2.",
            _signals,
            "NAMES",
            ours=True,
        ),
        Flag(
            "--no-guardian",
            "Do without the small process that ends the workers when this one is killed.",
            ours=True,
            negates="guardian",
        ),
    ),
    "Failures": (
        Flag(
            "--hang-timeout",
            "End the job, and show where each worker is, when one has written nothing and used no "
            "CPU for so long; or, once it has called asupervise.heartbeat(), not called it again "
            "(default: never). Output that would go straight to the console is teed, to be seen.",
            _seconds_above_zero,
            "SECONDS",
            ours=True,
        ),
        Flag(
            "--memory-sample-interval",
            "How often to look at the workers' memory, which the report of a SIGKILL tells; "
            "soon at first, then at this interval; 0: never (default: 600; with --live: 1).",
            _seconds,
            "SECONDS",
            ours=True,
        ),
    ),
    "Events and metrics": (
        Flag(
            "--events",
            "Append what happens to this file, as lines of JSON; -: to stderr. A pipe is waited "
            "for, and slows nobody.",
            _path,
            "FILE",
            ours=True,
        ),
        Flag(
            "--event-log-handler",
            "Who is told what happens, with commas between them: console (lines of JSON on "
            "stderr), otel (OpenTelemetry spans), prometheus (needs --metrics-port), null, or "
            "those of entry points (group asupervise.event_handlers) (default: null).",
            _names,
            "NAME,...",
        ),
        Flag(
            "--metrics-port",
            "Serve metrics for Prometheus on this port of 127.0.0.1, or of HOST (default: none).",
            _metrics_port,
            "[HOST:]PORT",
            ours=True,
        ),
    ),
    "Where the ranks meet": (
        Flag("--standalone", "On this machine, on a free port; overrides all but --local-addr."),
        Flag(
            "--local-addr",
            "This machine's address: MASTER_ADDR where no other is given (default: 127.0.0.1).",
            _host,
            "HOST",
        ),
        Flag("--master-addr", "MASTER_ADDR of the workers.", _host, "HOST"),
        Flag("--master-port", "MASTER_PORT of the workers (default: a free one).", _port, "PORT"),
        Flag(
            "--rdzv-backend",
            "How nodes find each other. static: --node-rank and the address of node 0; env: what "
            "Slurm, Open MPI, Kubernetes or plain variables say; etcd; c10d: torch's TCPStore, on "
            "one node as --standalone; or that of an entry point (default: env under a scheduler "
            "where --nnodes is not given, or else static).",
            str,
            "NAME",
        ),
        Flag(
            "--rdzv-endpoint",
            "Where the backend is: etcd's members with commas between them, the host of c10d's "
            "store, or for static MASTER_ADDR and MASTER_PORT.",
            _endpoints,
            "HOST:PORT",
        ),
        Flag("--rdzv-id", "The job's name (default: a random one).", _run_id, "ID"),
        Flag(
            "--rdzv-conf",
            "Settings of the backend: join_timeout, last_call_timeout; of etcd also lease_ttl, "
            "timeout, protocol, cacert, cert, key, user, password_file, prefix.",
            _pairs,
            "KEY=VALUE,...",
        ),
    ),
    "Nodes and restarts": (
        Flag(
            "--nnodes",
            "How many nodes; MIN:MAX where nodes may come and go (default: 1).",
            _node_count,
            "N|MIN:MAX",
        ),
        Flag("--node-rank", "This node's place, from 0 (static: needed).", _count, "RANK"),
        Flag(
            "--max-restarts",
            "How often the whole job is started anew after a failure, counted over all nodes "
            "(default: 0).",
            _count,
            "N",
        ),
        Flag(
            "--restart",
            "What is started anew: group, all workers; worker, the one that has ended, for "
            "services that are no ranked job: at most --max-restarts within --restart-within "
            "(default: group).",
            _choice("group", "worker"),
            "WHAT",
            ours=True,
        ),
        Flag(
            "--restart-within",
            "See --restart (default: 60).",
            _seconds_above_zero,
            "SECONDS",
            ours=True,
        ),
        Flag(
            "--min-uptime",
            "A worker that fails sooner is a broken start; three in a row end the job (default: "
            "1).",
            _seconds,
            "SECONDS",
            ours=True,
        ),
        Flag(
            "--restart-backoff",
            "The wait before the first restart, doubled with each one in a row up to 30 s "
            "(default: 1).",
            _seconds,
            "SECONDS",
            ours=True,
        ),
    ),
    "Kept for those who come from torch": (
        Flag(
            "--no-use-env",
            "Add --local-rank=N to the script's arguments, as torch.distributed.launch does.",
            ours=True,
            negates="use_env",
        ),
        Flag("--use-env", "Leave them as they are, as torchrun does (default).", ours=True),
        Flag(
            "--start-method",
            "Accepted; programs have no use for it.",
            _choice("spawn", "fork", "forkserver"),
            "METHOD",
        ),
        Flag("--monitor-interval", "Accepted; nothing is polled.", _seconds, "SECONDS"),
    ),
    "About": (
        Flag("--dry-run", "Print what would be started, and why; start nothing.", ours=True),
        Flag("--help", "Print this and exit.", short="-h"),
        Flag("--version", "Print the version and exit.", ours=True),
    ),
}
