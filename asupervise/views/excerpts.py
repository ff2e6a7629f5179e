"""The ends of a run's logs, as much of them as a page can hold; it links the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from asupervise.views.files import LogFile, tail
from asupervise.views.markup import Html, log_html, tag
from asupervise.views.plain import decoded, overwritten, ranks_text
from asupervise.views.words import count, size

__all__ = ["Excerpt", "excerpts_of", "limits_of", "link_to", "logs_section"]

# Of all logs together, of one, and of one of many. The culprit's come first.
_ALL_BYTES: Final = 3 << 20
_MOST_BYTES: Final = 96 << 10
_CULPRIT_BYTES: Final = 256 << 10
_LEAST_BYTES: Final = 512
_MOST_FILES: Final = 4096
_MOST_LISTED: Final = 40
_LINE_CHARS: Final = 4096
_LITERAL: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/")


class Excerpt(NamedTuple):
    """The end of a log, or of several that end the same.

    Attributes:
        files: whose.
        text: whole lines, as they are.
        cut: how many bytes before it are left out.
    """

    files: tuple[LogFile, ...]
    text: str
    cut: int


def excerpts_of(files: Sequence[LogFile], culprit: tuple[int, int] | None) -> list[Excerpt]:
    """Read what is to be shown; equal ones are one.

    Args:
        files: the logs that there are, those without anything in them included.
        culprit: attempt and local rank of the worker that is looked at first.
    """
    written = [file for file in files if file.size]
    # Who failed first comes first, then the newest attempts.
    written.sort(
        key=lambda file: (
            (file.life.attempt, file.life.local_rank) != culprit,
            -file.life.attempt,
            file.life.outcome != "failed",
            file.life.local_rank,
            file.stream,
        )
    )
    written = written[:_MOST_FILES]
    limits = limits_of([file.size for file in written], _firsts(written, culprit))
    found: dict[object, list[LogFile]] = {}
    texts: dict[object, tuple[str, int]] = {}
    for file, limit in zip(written, limits, strict=True):
        data = tail(file.path, limit) if limit else b""
        key: object = (file.stream, file.life.attempt, file.size, data) if data else file
        found.setdefault(key, []).append(file)
        texts.setdefault(key, (decoded(data), file.size - len(data)))
    return [Excerpt(tuple(same), *texts[key]) for key, same in found.items()]


def _firsts(files: Sequence[LogFile], culprit: tuple[int, int] | None) -> int:
    return sum((file.life.attempt, file.life.local_rank) == culprit for file in files)


def limits_of(sizes: Sequence[int], firsts: int) -> list[int]:
    """How much of each log is shown: all have the same share, and what one leaves others get.

    Args:
        sizes: of the logs.
        firsts: so many at the beginning are more important.

    Example:
        >>> limits_of([10, 1 << 30], 0)
        [10, 98304]
    """
    limits = [min(size, _CULPRIT_BYTES) for size in sizes[:firsts]]
    left = _ALL_BYTES - sum(limits)
    rest = list(sizes[firsts:])
    chosen: dict[int, int] = {}
    order = sorted(range(len(rest)), key=rest.__getitem__)
    for place, index in enumerate(order):
        fair = left // (len(order) - place)
        chosen[index] = min(rest[index], fair, _MOST_BYTES)
        left -= chosen[index]
    # Less than a line or two says nothing: then there is the link alone.
    limits += [
        limit if limit >= min(_LEAST_BYTES, rest[index]) else 0
        for index, limit in sorted(chosen.items())
    ]
    return limits


def logs_section(
    excerpts: Sequence[Excerpt], files: Sequence[LogFile], base: str, failed: bool
) -> Html:
    """The section, with what searches and filters it.

    Args:
        excerpts: what is shown.
        files: all logs.
        base: from the page to the run's folder, "" or with a slash at its end.
        failed: whether the first one is the culprit's, and is opened.
    """
    if not files:
        note = "What the workers printed went to no file. --tee 3 keeps it here, and shows it."
        return tag("section", tag("h2", "Logs"), tag("p", note, class_="note"), id="logs")
    silent = [file for file in files if not file.size]
    several = len({file.life.attempt for file in files}) > 1
    shown = [
        _excerpt(each, base, several, opened=place == 0 and (failed or len(excerpts) == 1))
        for place, each in enumerate(excerpts)
    ]
    return tag(
        "section",
        tag("h2", "Logs"),
        _filters(files) if excerpts else None,
        shown[:_MOST_LISTED],
        _rest(shown[_MOST_LISTED:]),
        tag("p", "Nothing matches.", id="none", class_="note", hidden=True),
        _silence(silent, files),
        id="logs",
    )  # fmt: skip


def _rest(more: Sequence[Html]) -> Html | None:
    if not more:
        return None
    return tag("details", tag("summary", count(len(more), "more log")), more, id="more")


def _filters(files: Sequence[LogFile]) -> Html:
    streams = sorted({file.stream for file in files}, reverse=True)
    attempts = sorted({file.life.attempt for file in files})
    fields = [
        tag("label", "Search", tag("input", id="find", type="search", autocomplete="off",
            spellcheck="false", placeholder="text, or /pattern/")),
        tag("label", "Ranks", tag("input", id="only", autocomplete="off", inputmode="text",
            placeholder="all, or 0,2-5")),
        _choice("stream", "Stream", [("", "both"), *((each, each) for each in streams)]),
    ]  # fmt: skip
    if len(attempts) > 1:
        options = [("", "all"), *((str(each), str(each)) for each in attempts[-100:])]
        fields.append(_choice("attempt", "Attempt", options))
    # Without scripts it would be of no use, and is not shown.
    return tag("form", fields, tag("output", id="found"), id="filters", hidden=True)


def _choice(name: str, label: str, options: Sequence[tuple[str, str]]) -> Html:
    items = [tag("option", text, value=value) for value, text in options]
    return tag("label", label, tag("select", items, id=name))


def _excerpt(excerpt: Excerpt, base: str, several: bool, *, opened: bool) -> Html:
    first = excerpt.files[0]
    life = first.life
    ranks = [file.life.rank for file in excerpt.files]
    many = "s" if len(ranks) > 1 else ""
    attempt = f"attempt {life.attempt}" if several else None
    return tag(
        "details",
        tag(
            "summary",
            tag("b", f"rank{many} {ranks_text(ranks, 8)}"),
            tag("span", first.stream, class_=f"tag {first.stream}"),
            tag("span", attempt, class_="tag") if attempt else None,
            tag("small", size(first.size)),
            tag("small", class_="hits"),
        ),
        tag("p", _how_much(excerpt), tag("a", first.relative, href=link_to(base + first.relative)),
            class_="note"),
        tag("pre", log_html(_lines(excerpt.text)), tabindex=0) if excerpt.text else None,
        class_="log",
        open=opened,
        data_ranks=ranks_text(ranks, len(ranks)),
        data_stream=first.stream,
        data_attempt=life.attempt,
    )  # fmt: skip


def _how_much(excerpt: Excerpt) -> str:
    same = f"{count(len(excerpt.files), 'file')} end the same. " if len(excerpt.files) > 1 else ""
    if not excerpt.text:
        return f"{same}Too much to be shown here. The file: "
    if excerpt.cut:
        return f"{same}The last {size(len(excerpt.text))}; {size(excerpt.cut)} before it are in "
    return f"{same}All of "


def link_to(path: str) -> str:
    """A relative path, as an address has it.

    Example:
        >>> link_to("attempt_0/a b%/stdout.log")
        'attempt_0/a%20b%25/stdout.log'
    """
    # urllib.parse takes longer to import than an ordinary report to be made.
    data = path.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if chr(byte) in _LITERAL else f"%{byte:02X}" for byte in data)


def _lines(text: str) -> str:
    lines = text.rstrip("\n").split("\n")
    return "\n".join(_short(overwritten(line)) for line in lines)


def _short(line: str) -> str:
    if len(line) <= _LINE_CHARS:
        return line
    return f"{line[:_LINE_CHARS]} … ({len(line) - _LINE_CHARS:,} more characters)"


def _silence(silent: Sequence[LogFile], files: Sequence[LogFile]) -> Html | None:
    if not silent:
        return None
    if len(silent) == len(files):
        return tag("p", "Nobody has written anything.", class_="note")
    parts = []
    for stream in ("stdout", "stderr"):
        spoke = {file.life.rank for file in files if file.size and file.stream == stream}
        ranks = {file.life.rank for file in silent if file.stream == stream} - spoke
        if ranks:
            parts.append(f"{stream} of rank{'s' if len(ranks) > 1 else ''} "
                         f"{ranks_text(ranks, 8)}")  # fmt: skip
    return tag("p", f"Empty: {'; '.join(parts)}.", class_="note") if parts else None
