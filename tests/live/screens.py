"""A real terminal for tests: tmux, of any size, whose screen is read and waited for.

Nothing here sleeps: what a pane writes is also piped to us, and each time that something comes the
screen is looked at.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.browser import PICTURES_VARIABLE

CEILING_S: Final = 40.0
Pick = Callable[[list[str]], bool]


class Screen:
    """One pane of a tmux server of its own.

    Args:
        folder: for its files.
        command: run by a shell in it.
        columns: of the terminal.
        lines: likewise.
        env: of the command.
    """

    def __init__(
        self, folder: Path, command: str, columns: int, lines: int, env: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._socket = folder / "tmux"
        self._env = env
        pipe, held = folder / "pane", folder / "held"
        for fifo in (pipe, held):
            os.mkfifo(fifo)
        self._fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._held = os.open(held, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        size = ("-x", str(columns), "-y", str(lines))
        # It begins when its output is piped to us, and stays at the end to be looked at.
        # A Ctrl-C is none of this shell's business.
        script = f"trap : INT; read x < {held}; {command}\necho exit status $?; exec sleep 1000"
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, "/bin/sh", "-c", script)
        self.tmux("pipe-pane", "-O", f"exec cat > {pipe}")
        self.server = int(self.tmux("display-message", "-p", "#{pid}"))
        os.write(self._held, b"go\n")

    def tmux(self, *words: str) -> str:
        """Run a command of tmux; returns what it says."""
        argv = ["tmux", "-u", "-S", str(self._socket), *words]
        done = subprocess.run(argv, env=dict(self._env), capture_output=True, check=False)
        assert done.returncode == 0, (words, done.stderr.decode())
        return done.stdout.decode()

    def lines(self, *, history: bool = False, colours: bool = False) -> list[str]:
        """What is on the screen, from above to below."""
        words = ["-S", "-"] if history else []
        words += ["-e"] if colours else []
        return self.tmux("capture-pane", "-p", *words).split("\n")[:-1]

    def wait(self, pick: Pick, *, history: bool = False) -> list[str]:
        """Wait until the screen is like that; returns its lines."""
        due = time.monotonic() + CEILING_S
        while True:
            lines = self.lines(history=history)
            if pick(lines):
                return lines
            left = due - time.monotonic()
            if left <= 0:
                pytest.fail("not seen on the screen:\n" + "\n".join(lines), pytrace=False)
            # Whatever has been written since wakes us.
            select.select([self._fd], [], [], left)
            while select.select([self._fd], [], [], 0)[0]:
                os.read(self._fd, 1 << 20)

    def wait_for(self, *texts: str) -> list[str]:
        """Wait until each of these is somewhere on the screen."""
        return self.wait(lambda lines: all(any(text in line for line in lines) for text in texts))

    def resize(self, columns: int, lines: int) -> None:
        self.tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    @property
    def cursor_is_shown(self) -> bool:
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    @property
    def shows_what_is_typed(self) -> bool:
        tty = self.tmux("display-message", "-p", "#{pane_tty}").strip()
        argv = ["stty", "-F", tty, "-a"]
        modes = subprocess.run(argv, capture_output=True, check=True).stdout.decode()
        return "echo" in modes.split()

    def close(self) -> None:
        self.tmux("kill-server")
        os.close(self._fd)
        os.close(self._held)


def tmux_or_skip() -> None:
    if shutil.which("tmux") is None:
        pytest.skip("no tmux is installed")


# --- pictures of it, for people -----------------------------------------------------------------

_PAGE = """<html><body style="margin:0;background:{background}"><pre style="margin:12px;
display:inline-block;font:15px/1.25 'DejaVu Sans Mono',monospace;color:{foreground}">{code}</pre>
</body></html>"""


def take_picture(screen: Screen, request: pytest.FixtureRequest, name: str) -> None:
    """Two pictures of a screen, dark and light, where somebody wants them."""
    if not os.environ.get(PICTURES_VARIABLE):
        return
    from rich.console import Console
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI
    from rich.text import Text

    folder, open_page = (request.getfixturevalue(each) for each in ("pictures", "open_page"))
    lines = screen.lines(colours=True)
    (folder / f"{name}.txt").write_text("\n".join(screen.lines()) + "\n")
    for scheme, theme in (("light", DEFAULT_TERMINAL_THEME), ("dark", DIMMED_MONOKAI)):
        console = Console(record=True, file=io.StringIO(), width=400, color_system="truecolor")
        # As one: colours go on over the ends of lines.
        console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
        page = open_page()
        page.set_content(console.export_html(theme=theme, inline_styles=True, code_format=_PAGE))
        page.locator("pre").screenshot(path=folder / f"{name}-{scheme}.png")
