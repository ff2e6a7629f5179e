"""Why a node's workers are to be ended though they have not failed: a leaf."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Interruption"]


class Interruption(NamedTuple):
    """Why our workers are to be ended.

    Attributes:
        kind: ``"failed"``: workers of another node have failed; ``"superseded"``: there is another
            round; ``"over"``: the run has ended.
        why: a sentence.
    """

    kind: str
    why: str
