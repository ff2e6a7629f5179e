"""The fenced blocks of the pages, and how they are run.

A fence's language says what becomes of it:

=========== =======================================================================================
python      run, in order, in one process and one namespace a page; `await` may stand by itself
console     each line after ``$ `` is a command for bash, and what follows it is its output; so is
            a ``text`` block that begins with ``$ ``
sh          run by bash; each command must succeed
text        shown only; with `output` it is what the block before it has printed
=========== =======================================================================================

Attributes after the language:

- ``title="NAME"``: written to a file of that name in the page's folder, for a later block to use.
- ``not-run="REASON"``: not run here; it is parsed all the same.
- ``not-compared="REASON"``: run, but what it prints depends on the machine.
- ``any-order``: the lines of the output come in any order.
- ``any-numbers``: its numbers differ; together with `any-order`, also how often a line comes that
  is another only by its numbers.

In what is expected ``...`` stands for any text in a line and, alone in a line, for any lines. What
differs each time (`VOLATILE`) is made equal on both sides, and lines of workers, which have a
prefix, are sorted by it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 50.0
# What every page finds in its folder.
LINKS = {"examples": "examples", "example-run": "docs/assets/example-run"}

_FENCE = re.compile(r"^( *)```(\w*)([^`\n]*)\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
_ATTRIBUTE = re.compile(r'([\w-]+)(?:="([^"]*)")?')
_PREFIXED = re.compile(r"\[\w+\d+\]:")

# Read from above: what a pattern finds becomes its text, in what is shown and in what comes.
VOLATILE = tuple(
    (re.compile(pattern, re.MULTILINE), text)
    for pattern, text in (
        (r"\x1b\[[0-9;]*m", ""),
        (r"\d{4}-\d\d-\d\d[_ T]\d\d:\d\d:\d\d(\.\d+)?", "<time>"),
        (r"\bpid: \d+", "pid: <pid>"),
        (r"(?<=host      : ).*", "<host>"),
        (r"\S*asupervise_[\w-]+", "<run folder>"),
        (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "<id>"),
        (r"_[0-9a-f]{8}\b", "_<id>"),
        (r"\bport \d+", "port <port>"),
        # Our own lines and those of Python move; those of the reader's files do not.
        (r'File ".*/(?:asupervise|python3[^"]*)/(\w+\.py)", line \d+', r'File "\1", line <n>'),
        (r'File "[^"]*/', 'File "'),
        (r"^[\s~^]*\^[\s~^]*\n", ""),
        (r"\b\d+\.\d+ (s|ms|MiB|MB)\b", r"<n> \1"),
    )
)


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Attributes:
        page: where it stands, below the root.
        line: of its opening fence.
        language: the first word after the fence.
        attributes: what else stands there; "" for one without a value.
        text: what is in it.
    """

    page: str
    line: int
    language: str
    attributes: dict[str, str]
    text: str

    @property
    def title(self) -> str | None:
        return self.attributes.get("title")

    @property
    def not_run(self) -> str | None:
        return self.attributes.get("not-run")

    @property
    def is_console(self) -> bool:
        return self.language == "console" or (
            self.language == "text" and self.text.startswith("$ ")
        )

    @property
    def is_run(self) -> bool:
        runs = self.language in ("python", "sh") or self.is_console
        return runs and self.not_run is None and self.title is None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets_of(page: str) -> list[Snippet]:
    """The fenced blocks of a page, by its path below the root."""
    text = (ROOT / page).read_text()
    return [
        Snippet(
            page=page,
            line=text.count("\n", 0, found.start()) + 1,
            language=found[2],
            attributes=dict(_ATTRIBUTE.findall(found[3])),
            text=textwrap.dedent(found[4]),
        )
        for found in _FENCE.finditer(text)
    ]


# --- running them -------------------------------------------------------------------------------


class Page:
    """Runs the blocks of one page, one after another, in a folder of its own.

    Args:
        folder: where they run, with `LINKS` in it.
        environ: of what they start.
    """

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._folder = folder / "page"
        self._folder.mkdir()
        for link, to in LINKS.items():
            (self._folder / link).symlink_to(ROOT / to)
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._environ = environ | {
            "PATH": f"{Path(sys.executable).parent}:{environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self._temporary),
        }
        self._python: subprocess.Popen[bytes] | None = None
        self._printed = folder / "printed"
        self._last = ""

    def run(self, snippet: Snippet) -> None:
        """Run it, or compare it with what has been printed.

        Raises:
            AssertionError: it failed, or what it printed is not what is shown.
        """
        if snippet.title is not None:
            path = self._folder / snippet.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(snippet.text)
        elif "output" in snippet.attributes:
            compare(snippet, snippet.text, self._last)
        elif not snippet.is_run:
            pass
        elif snippet.language == "python":
            self._last = self._run_python(snippet)
        elif snippet.is_console:
            self._run_console(snippet)
        else:
            self._last, status = self._bash(f"set -eu\n{snippet.text}")
            assert status == 0, f"{snippet}: exit status {status}\n{self._last}"

    def run_file(self, snippet: Snippet) -> str:
        """Run a block of Python as a program of its own, also one that is not run otherwise.

        Raises:
            AssertionError: it failed.
        """
        (self._folder / "program.py").write_text(snippet.text)
        printed, status = self._bash("python program.py")
        assert status == 0, f"{snippet}: exit status {status}\n{printed}"
        return printed

    def close(self) -> None:
        """End what still runs."""
        if self._python is not None:
            process, self._python = self._python, None
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(LIMIT_S)
            finally:
                kill_group(process)

    def _run_console(self, snippet: Snippet) -> None:
        commands = commands_of(snippet.text)
        # "\0" parts the outputs; the exit status of each is there for the next one's `$?`.
        lines = [f"{command}\n_s=$?; printf '\\0'; (exit $_s)" for command, _ in commands]
        printed, _ = self._bash("\n".join(lines))
        for (command, expected), actual in zip(commands, printed.split("\0"), strict=False):
            if "not-compared" not in snippet.attributes:
                compare(snippet, expected, actual, command)

    def _bash(self, script: str) -> tuple[str, int]:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with process:
            try:
                printed, _ = process.communicate(timeout=LIMIT_S)
            finally:
                kill_group(process)
        return self._readable(printed), process.returncode

    def _run_python(self, snippet: Snippet) -> str:
        if self._python is None:
            self._python = self._start_python()
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        before = self._printed.stat().st_size
        code = {"code": snippet.text, "name": str(snippet)}
        self._python.stdin.write(json.dumps(code).encode() + b"\n")
        self._python.stdin.flush()
        answer = self._python.stdout.readline()
        printed = self._readable(self._printed.read_bytes()[before:])
        assert answer == b"done\n", f"{snippet}: failed\n{printed}"
        return printed

    def _start_python(self) -> subprocess.Popen[bytes]:
        # By -c, as in a notebook: there is no file that workers could find functions in.
        with self._printed.open("wb") as printed:
            return subprocess.Popen(
                [sys.executable, "-W", "error", "-c", _INTERPRETER, str(printed.fileno())],
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                pass_fds=[printed.fileno()],
                start_new_session=True,
            )

    def _readable(self, printed: bytes) -> str:
        return printed.decode(errors="replace").replace(str(self._temporary), "/tmp")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a session that we have started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is


# Reads a line of JSON for each block, and answers each: that takes its standard streams, so what
# blocks print goes to the file that it is given.
_INTERPRETER = """
import ast, asyncio, inspect, json, linecache, os, sys, traceback

printed, answers = int(sys.argv[1]), os.dup(1)
os.dup2(printed, 1)
blocks = open(os.dup(0), "rb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.argv = [""]
names = sys.modules["__main__"].__dict__

def run(runner, text, name):
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    code = compile(text, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        runner.run(eval(code, names))
    else:
        eval(code, names)

with asyncio.Runner() as runner:
    while line := blocks.readline():
        block = json.loads(line)
        try:
            run(runner, block["code"], block["name"])
            answer = b"done\\n"
        except BaseException:
            traceback.print_exc()
            answer = b"failed\\n"
        sys.stdout.flush()
        os.write(answers, answer)
"""


# --- comparing ----------------------------------------------------------------------------------


def commands_of(text: str) -> list[tuple[str, str]]:
    """Each command of a console, its continuation lines with it, and the output that is shown.

    Example:
        >>> commands_of("$ echo a\\na\\n$ true\\n")
        [('echo a', 'a\\n'), ('true', '')]
    """
    found: list[tuple[str, str]] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if line.startswith("$ "):
            command = [line[2:]]
            while command[-1].endswith("\\") and lines:
                command.append(lines.pop(0).removeprefix("> "))
            found.append(("\n".join(command), ""))
        else:
            assert found, f"output before the first command: {line!r}"
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def compare(snippet: Snippet, expected: str, actual: str, command: str = "") -> None:
    """Whether what is shown is what came.

    Raises:
        AssertionError: it is not; with both.
    """
    if "any-numbers" in snippet.attributes:
        expected, actual = (re.sub(r" *\d[\d,.]*", " 0", text) for text in (expected, actual))
    wanted, got = lines_of(expected), lines_of(actual)
    if "any-order" in snippet.attributes:
        wanted, got = sorted(wanted), sorted(got)
        if "any-numbers" in snippet.attributes:
            wanted, got = list(dict.fromkeys(wanted)), list(dict.fromkeys(got))
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else f"{_with_gaps(line)}\n" for line in wanted
    )
    if not re.fullmatch(pattern, "".join(f"{line}\n" for line in got)):
        shown, came = "\n".join(wanted), "\n".join(got)
        raise AssertionError(
            f"{snippet}: {command}\n--- it shows\n{shown}\n--- it printed\n{came}\n"
            f"--- as it came\n{actual}"
        )


def _with_gaps(line: str) -> str:
    return ".*?".join(re.escape(part) for part in line.split("..."))


def lines_of(text: str) -> list[str]:
    """The lines, with what differs each time made equal and the workers' lines sorted."""
    for pattern, instead in VOLATILE:
        text = pattern.sub(instead, text)
    done: list[str] = []
    workers: list[str] = []
    for line in [*(line.rstrip() for line in text.strip("\n").splitlines()), ""]:
        if _PREFIXED.match(line):
            workers.append(line)
        else:
            # By the prefix alone: what one worker printed stays in its order.
            done += sorted(workers, key=lambda line: line.partition(":")[0])
            done.append(line)
            workers = []
    return done[:-1]
