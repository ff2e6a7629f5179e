"""What the documentation says of torchrun, beside torchrun; and its snippets that need torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.snippets import Page
from tests.test_docs import flags_in_the_table
from tests.test_snippets import NOT_RUN

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

NEEDS_TORCH = [snippet for snippet in NOT_RUN if snippet.not_run == "needs torch"]


def test_the_table_has_each_of_torchruns_flags() -> None:
    from torch.distributed.run import get_args_parser

    theirs = {
        next(name for name in action.option_strings if name.startswith("--")).replace("_", "-")
        for action in get_args_parser()._actions
        if action.option_strings
    }
    assert set(flags_in_the_table()) == theirs


@pytest.mark.parametrize("snippet", NEEDS_TORCH, ids=str)
def test_torchs_way_is_as_it_is_shown(snippet, tmp_path: Path) -> None:
    page = Page(tmp_path, clean_environment())
    try:
        assert page.run_file(snippet)
    finally:
        page.close()
