"""``python -m asupervise``: see `asupervise.cli`."""

import gc
import sys

# Nothing is garbage yet, and nothing will be before the workers run: to look for it while modules
# are loaded takes a tenth of a short run's time.
gc.disable()

try:
    from asupervise.cli import main as _main
except KeyboardInterrupt:
    sys.exit(130)  # nothing has been started yet


def main() -> int:
    """Run the command line; returns the exit status."""
    status = _main(on_started=_collect, alone=True)
    # The interpreter would look through everything once more, only to end.
    gc.freeze()
    return status


def _collect() -> None:
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    sys.exit(main())
