"""The other side of `processes.Resident`: runs one function as often as it is asked to.

    python -m benchmarks.resident MODULE:FUNCTION REPLY_FD

A request is a line of JSON on standard input, a reply one on the given descriptor.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    reply_fd = int(sys.argv[2])
    # Workers do not get it: they would keep the pipe open beyond our end.
    os.set_inheritable(reply_fd, False)
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    with asyncio.Runner() as runner:
        while line := sys.stdin.buffer.readline():
            try:
                reply = function(json.loads(line))
                if inspect.iscoroutine(reply):
                    reply = runner.run(reply)
            except Exception as error:
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            os.write(reply_fd, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
