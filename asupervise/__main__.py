"""``python -m asupervise``: see `asupervise.cli`."""

import sys

from asupervise.cli import main

if __name__ == "__main__":
    sys.exit(main())
