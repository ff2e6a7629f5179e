"""Which rank a worker is, whoever has started it."""

import os


def rank() -> int:
    """By the variables of torchrun and asupervise, mpirun, parallel (from 1), honcho (``w.1``)."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    one_based = os.environ.get("PARALLEL_SEQ") or os.environ["HONCHO_PROCESS_NAME"].split(".")[1]
    return int(one_based) - 1
