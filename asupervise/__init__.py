"""asupervise: start ranked worker processes, watch them, and leave none behind.

The names below are those of ``torch.distributed.elastic.multiprocessing``, so that an
import line and ``await`` are all that a caller changes::

    from asupervise import DefaultLogsSpecs, Std, rank_environments, start_processes

    async with start_processes(
        "trainer", (sys.executable, "train.py"), args={0: (), 1: ()},
        envs=rank_environments(2, parent_env=os.environ), logs_specs=DefaultLogsSpecs(tee=Std.ALL),
    ) as ctx:
        result = await ctx.wait()

They are resolved at first use (PEP 562): a worker's ``from asupervise import record``
imports neither asyncio nor anyio.
"""

import sys

# Type checkers take it for true. `typing` itself would cost a worker's `record` 12 ms.
TYPE_CHECKING = False

if sys.platform == "win32":
    raise ImportError(
        "asupervise needs POSIX process groups and sessions: it runs on Linux and other POSIX "
        "systems (on Windows: under WSL)"
    )

if TYPE_CHECKING:
    from asupervise.binding import AffinityMode as AffinityMode
    from asupervise.binding import MemoryPolicy as MemoryPolicy
    from asupervise.binding import NumaOptions as NumaOptions
    from asupervise.bus import EventBus as EventBus
    from asupervise.bus import Subscription as Subscription
    from asupervise.elastic.config import LaunchConfig as LaunchConfig
    from asupervise.elastic.decide import Policy as Policy
    from asupervise.elastic.launching import RunError as RunError
    from asupervise.elastic.launching import launch as launch
    from asupervise.elastic.services import Services as Services
    from asupervise.elastic.services import run_services as run_services
    from asupervise.environ import rank_environments as rank_environments
    from asupervise.error_handler import ErrorHandler as ErrorHandler
    from asupervise.error_handler import get_error_handler as get_error_handler
    from asupervise.error_handler import record as record
    from asupervise.errors import BindingError as BindingError
    from asupervise.errors import NotPicklableError as NotPicklableError
    from asupervise.errors import NotSupportedError as NotSupportedError
    from asupervise.errors import RankMapError as RankMapError
    from asupervise.errors import SignalException as SignalException
    from asupervise.errors import SupervisorError as SupervisorError
    from asupervise.errors import ZygoteError as ZygoteError
    from asupervise.exporters.handling import EventHandler as EventHandler
    from asupervise.exporters.handling import handle_events as handle_events
    from asupervise.failures import ProcessFailure as ProcessFailure
    from asupervise.failures import root_cause as root_cause
    from asupervise.formats import ConsoleFormat as ConsoleFormat
    from asupervise.functions.zygote import Zygote as Zygote
    from asupervise.handler import SubprocessHandler as SubprocessHandler
    from asupervise.lines import LogLine as LogLine
    from asupervise.logs import DefaultLogsSpecs as DefaultLogsSpecs
    from asupervise.logs import LogsDest as LogsDest
    from asupervise.logs import LogsSpecs as LogsSpecs
    from asupervise.logs import Std as Std
    from asupervise.logs import to_map as to_map
    from asupervise.plan import GroupPlan as GroupPlan
    from asupervise.plan import WorkerPlan as WorkerPlan
    from asupervise.procs import PContext as PContext
    from asupervise.procs import plan_processes as plan_processes
    from asupervise.procs import start_processes as start_processes
    from asupervise.result import ChildFailedError as ChildFailedError
    from asupervise.result import RunProcsResult as RunProcsResult
    from asupervise.signals import handle_signals as handle_signals
    from asupervise.stacks import Stack as Stack
    from asupervise.topology import Topology as Topology
    from asupervise.topology import read_topology as read_topology
    from asupervise.views.live.view import live_view as live_view
    from asupervise.worker import heartbeat as heartbeat
    from asupervise.worker import progress as progress

__version__ = "0.1.0"

_HOMES = {
    "AffinityMode": "binding",
    "BindingError": "errors",
    "ChildFailedError": "result",
    "ConsoleFormat": "formats",
    "DefaultLogsSpecs": "logs",
    "ErrorHandler": "error_handler",
    "EventBus": "bus",
    "EventHandler": "exporters.handling",
    "GroupPlan": "plan",
    "LaunchConfig": "elastic.config",
    "LogLine": "lines",
    "LogsDest": "logs",
    "LogsSpecs": "logs",
    "MemoryPolicy": "binding",
    "NotPicklableError": "errors",
    "NotSupportedError": "errors",
    "NumaOptions": "binding",
    "PContext": "procs",
    "Policy": "elastic.decide",
    "ProcessFailure": "failures",
    "RankMapError": "errors",
    "RunError": "elastic.launching",
    "RunProcsResult": "result",
    "Services": "elastic.services",
    "SignalException": "errors",
    "Std": "logs",
    "SubprocessHandler": "handler",
    "Subscription": "bus",
    "SupervisorError": "errors",
    "Topology": "topology",
    "WorkerPlan": "plan",
    "Stack": "stacks",
    "Zygote": "functions.zygote",
    "ZygoteError": "errors",
    "get_error_handler": "error_handler",
    "handle_events": "exporters.handling",
    "handle_signals": "signals",
    "heartbeat": "worker",
    "launch": "elastic.launching",
    "live_view": "views.live.view",
    "plan_processes": "procs",
    "progress": "worker",
    "rank_environments": "environ",
    "read_topology": "topology",
    "record": "error_handler",
    "root_cause": "failures",
    "run_services": "elastic.services",
    "start_processes": "procs",
    "to_map": "logs",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asupervise' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"asupervise.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
