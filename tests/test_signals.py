"""`handle_signals`: what the command line does on signals, for apps that ask for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from asupervise import PContext, handle_signals
from asupervise.signals import ENDING_SIGNALS
from tests.workers import (
    READY,
    RUNNERS,
    SLEEP,
    STUBBORN,
    Channel,
    settle,
    start,
)

Runner = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]

every_loop = pytest.mark.parametrize("run", RUNNERS, ids=lambda run: run.__name__)

# Says which signal it got, and goes on.
TELLS = (
    "for sig in USR1 USR2; do trap \"echo $sig $RANK > '$CHANNEL'\" $sig; done; "
    'trap "exit 7" TERM; trap "exit 8" HUP; ' + READY + "while :; do sleep 0.01; done"
)

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe", "own_temporary_folder")


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {sig: signal.getsignal(sig) for sig in signal.valid_signals()}
    yield
    assert {sig: signal.getsignal(sig) for sig in signal.valid_signals()} == before


def send(sig: int) -> None:
    os.kill(os.getpid(), sig)


async def codes_of(ctx: PContext) -> dict[int, int]:
    result = await ctx.wait()
    assert result is not None
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


# --- ending -------------------------------------------------------------------------------------


@every_loop
def test_the_first_is_passed_on_and_ends_the_group(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        async with start(channel, TELLS, TELLS) as ctx:
            with handle_signals(ctx) as handling:
                await channel.lines(2)
                assert handling.received is None
                send(signal.SIGHUP)
                assert await codes_of(ctx) == {0: 8, 1: 8}
                assert handling.received is signal.SIGHUP

    run(main)


@every_loop
def test_the_second_kills(run: Runner, channel: Channel) -> None:
    async def main() -> list[Any]:
        heard: list[Any] = []
        async with start(channel, STUBBORN) as ctx:
            with handle_signals(ctx, on_signal=lambda sig, again: heard.append((sig, again))):
                await channel.lines(1)
                send(signal.SIGTERM)
                assert await ctx.wait(0.1) is None
                send(signal.SIGINT)
                assert await codes_of(ctx) == {0: -9}
        return heard

    assert run(main) == [(signal.SIGTERM, False), (signal.SIGINT, True)]


async def test_the_grace_is_that_of_the_call(channel: Channel) -> None:
    async with start(channel, STUBBORN) as ctx:
        with handle_signals(ctx, shutdown_timeout=0.05):
            await channel.lines(1)
            send(signal.SIGTERM)
            assert await asyncio.wait_for(codes_of(ctx), 5) == {0: -9}


# --- passing on ---------------------------------------------------------------------------------


@every_loop
def test_forwarded_signals_end_nothing(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        async with start(channel, TELLS, TELLS) as ctx:
            with handle_signals(ctx, forward=(signal.SIGUSR1, signal.SIGUSR2)) as handling:
                await channel.lines(2)
                for sig, name in ((signal.SIGUSR1, "USR1"), (signal.SIGUSR2, "USR2")):
                    send(sig)
                    assert sorted(await channel.lines(2)) == [[name, "0"], [name, "1"]]
                assert handling.received is None
                assert await ctx.wait(0) is None
                # And afterwards the first ending one is still the first.
                send(signal.SIGTERM)
                assert await codes_of(ctx) == {0: 7, 1: 7}

    run(main)


async def test_a_signal_that_cannot_be_forwarded_is_told_to_the_loop(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, what: told.append(what))

    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    async with start(channel, TELLS) as ctx:
        await channel.lines(1)
        with handle_signals(None, forward=[signal.SIGUSR1]) as handling:
            with monkeypatch.context() as patch:
                patch.setattr(PContext, "send_signal", refused)
                send(signal.SIGUSR1)
                await settle()
                send(signal.SIGTERM)
                await settle()
                # What cannot be forwarded does not keep the next one from being heard.
                handling.attend(ctx)
            assert await codes_of(ctx) == {0: 7}
    assert [type(what["exception"]) for what in told] == [PermissionError]
    assert f"signal {signal.SIGUSR1.value} could not be forwarded" in told[0]["message"]


async def test_nobody_is_left_to_forward_to(channel: Channel) -> None:
    async with start(channel, "exit 3") as ctx:
        with handle_signals(ctx, forward=[signal.SIGUSR1]):
            assert await codes_of(ctx) == {0: 3}
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            await settle()
    await settle()


async def test_a_real_time_signal_has_no_name_and_is_forwarded(channel: Channel) -> None:
    number = signal.SIGRTMIN + 5
    script = f"trap \"echo rt $RANK > '$CHANNEL'\" {int(number)}; " + READY
    async with start(channel, script + "while :; do sleep 0.01; done") as ctx:
        await channel.lines(1)
        with handle_signals(ctx, signals=[number - 1], forward=[number]) as handling:
            send(number)
            assert await channel.lines(1) == [["rt", "0"]]
            send(number - 1)
            assert await codes_of(ctx) == {0: -(number - 1)}
            assert handling.received == number - 1


# --- before the group is there ------------------------------------------------------------------


@every_loop
def test_nothing_is_lost_before_there_is_a_group(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        with handle_signals(forward=[signal.SIGUSR1]) as handling:
            send(signal.SIGUSR1)
            await settle()
            async with start(channel, TELLS) as ctx:
                await channel.lines(1)
                handling.attend(ctx)
                assert await channel.lines(1) == [["USR1", "0"]]
                send(signal.SIGTERM)
                assert await codes_of(ctx) == {0: 7}

    run(main)


async def test_two_before_there_is_a_group_kill_it(channel: Channel) -> None:
    with handle_signals() as handling:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        async with start(channel, STUBBORN) as ctx:
            await channel.lines(1)
            handling.attend(ctx)
            assert await asyncio.wait_for(codes_of(ctx), 5) == {0: -9}
        assert handling.received is signal.SIGTERM


async def test_an_app_whose_function_raises_still_ends_its_group(channel: Channel) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, what: told.append(what))

    def broken(sig: signal.Signals, again: bool) -> None:
        raise ValueError("not my day")

    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        with handle_signals(ctx, on_signal=broken):
            send(signal.SIGTERM)
            assert await codes_of(ctx) == {0: -15}
    assert [str(what["exception"]) for what in told] == ["not my day"]


# --- what was there before ----------------------------------------------------------------------


async def test_handlers_are_restored_exactly(channel: Channel) -> None:
    def mine(*args: object) -> None:
        pass

    chosen = {signal.SIGTERM: mine, signal.SIGHUP: signal.SIG_IGN, signal.SIGQUIT: signal.SIG_DFL}
    before = {sig: signal.signal(sig, action) for sig, action in chosen.items()}
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with handle_signals():
            assert {signal.getsignal(sig) for sig in ENDING_SIGNALS}.isdisjoint(
                [*chosen.values(), interrupt]
            )
        assert {sig: signal.getsignal(sig) for sig in chosen} == chosen
        assert signal.getsignal(signal.SIGINT) is interrupt
        with pytest.raises(KeyError), handle_signals():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for sig, action in before.items():
            signal.signal(sig, action)


async def test_handlers_of_the_loop_are_called_as_well(channel: Channel) -> None:
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, heard.set)
    try:
        async with start(channel, SLEEP) as ctx:
            await channel.lines(1)
            with handle_signals(ctx):
                send(signal.SIGTERM)
                assert await codes_of(ctx) == {0: -15}
                await asyncio.wait_for(heard.wait(), 5)
            heard.clear()
            send(signal.SIGTERM)
            await asyncio.wait_for(heard.wait(), 5)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


# --- calls that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": [signal.SIGTERM]}, r"forward: SIGTERM: to end the group as well"),
        ({"signals": [signal.SIGKILL]}, r"signals: SIGKILL: cannot be handled"),
        ({"forward": [signal.SIGSTOP, 4711]}, r"forward: SIGSTOP, 4711: cannot be handled"),
        ({"signals": [0]}, r"signals: 0: cannot be handled"),
        ({"shutdown_timeout": -1}, r"shutdown_timeout: -1"),
        ({"shutdown_timeout": float("nan")}, r"shutdown_timeout: nan"),
    ],
)
async def test_one_clear_error_and_nothing_installed(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), handle_signals(**arguments):
        pytest.fail("entered")


def test_not_in_another_thread() -> None:
    caught: list[BaseException] = []

    async def main() -> None:
        with pytest.raises(ValueError, match="main thread") as error, handle_signals():
            pytest.fail("entered")
        caught.append(error.value)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_not_without_a_loop() -> None:
    with pytest.raises(RuntimeError, match="loop"), handle_signals():
        pytest.fail("entered")


# --- a whole app --------------------------------------------------------------------------------


def test_an_app_ends_as_the_command_line_does(tmp_path: Path) -> None:
    """Ctrl-C in an app under ``asyncio.run``: no KeyboardInterrupt, and the result is there."""
    code = """
        import asyncio, signal
        from asupervise import handle_signals, start_processes

        async def main():
            before = signal.getsignal(signal.SIGINT)
            async with start_processes("t", "sleep", {0: (1000,)}, {0: {}}) as ctx:
                with handle_signals(ctx) as handling:
                    print("ready", flush=True)
                    result = await ctx.wait()
            print(result.failures[0].exitcode, handling.received.name)
            print(signal.getsignal(signal.SIGINT) is before)

        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "-2 SIGINT\nTrue\n"
    assert process.returncode == 0
