"""The first steps of a worker that is a fresh interpreter.

The supervisor starts ``python -c`` with the one line `LINE` and these arguments: the folder that
holds this package, the function's name (for those who look at ``ps``), and the descriptors of the
call and of the result.
"""

from __future__ import annotations

import sys

from asupervise.functions import running

LINE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from asupervise.functions.bootstrap import main; main()"
)


def main() -> None:
    """Run the worker's call."""
    call_fd, result_fd = int(sys.argv[-2]), int(sys.argv[-1])
    setup = running.read_setup(call_fd)
    running.inherited = setup["fds"]
    running.prepare(setup)
    running.run_call(call_fd, result_fd, setup)
