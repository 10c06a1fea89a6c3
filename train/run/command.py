"""How a command ends: a mistake is one line, an interruption saves first.

    if __name__ == "__main__":
        run_command(main, parse_args)

Python runs a signal's handler between two instructions of the main thread, which may
wait for a compiled program for minutes. A thread, which the system wakes at once,
therefore answers the first signal and ends the process at the second.
"""

import contextlib
import errno
import linecache
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adamw_jax

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0  # seconds in which a command without steps to finish ends by itself
SOURCES = [Path(__file__).parents[1], Path(adamw_jax.__file__).parent]
# What the system says about paths and disks, and a user can change.
SYSTEM_ERRORS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EDQUOT),
}


def run_command(
    main: Callable[[Any], Any],
    parse_args: Callable[[list[str]], Any],
    args: list[str] | None = None,
) -> None:
    """Runs a command and ends the process if it fails or is interrupted.

    An error of ours is printed as one line and ends with status 2; `--traceback` shows
    where it was raised. Any other exception is a bug and keeps its traceback. SIGINT
    (Ctrl-C) ends with status 130, SIGTERM with 143. The first signal lets the loops
    inside `finish_steps` save; a second one ends the process at once.

    Args:
        main: called with the configuration.
        parse_args: makes it from the command line.
        args: the command line; None: that of the process.
    """
    args = sys.argv[1:] if args is None else args
    rest = [arg for arg in args if arg != "--traceback"]
    with _answered_signals():
        try:
            main(parse_args(rest))
        except SystemExit as end:
            if not end.code and {"-h", "--help"} & {*rest}:
                print("--traceback: after an error, show where it was raised.")
            raise
        except KeyboardInterrupt as interrupt:
            _print_last(str(interrupt) or "Stopped.")
            status = 128 + (_asked.signal or signal.SIGINT)
            _exit_soon(status)
            sys.exit(status)
        except Exception as error:
            if len(rest) < len(args) or not is_ours(error):
                raise
            _print_last(f"error: {_sentence(error)}")
            sys.exit(2)


def is_ours(error: BaseException) -> bool:
    """Whether an exception is a sentence for the user, and not a bug.

    It is one if a `raise` of the scripts or of the library raised it, or if the system
    refused a path.
    """
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS and error.filename:
        return True
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    line = linecache.getline(file, trace.tb_lineno).split()
    ours = any(Path(file).is_relative_to(folder) for folder in SOURCES)
    return ours and line[:1] == ["raise"]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).splitlines())


def _print_last(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------
# interruptions
# ---------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ends the command after a signal; its text is what the user reads."""


class _Asked:
    """What the process was asked to do, and what it is doing."""

    signal: int | None = None  # the first one
    in_steps = False  # the next step ends the command, not the signal itself
    resumable = False  # the same command goes on
    ending = False
    wakeup: Any = None  # the sockets that wake the thread, kept open until the end


_asked = _Asked()


class Stop:
    """Asks, in a loop over steps, whether to stop."""

    _now = False

    def asked(self) -> bool:
        """Whether a signal came: save, and then call `here`."""
        self._now = _asked.signal is not None
        return self._now

    def here(self, step: int) -> None:
        """Raises `Interrupted` if the last call of `asked` said so.

        Not if a signal has come since, because then this step may not be saved.
        """
        if self._now:
            _asked.ending = True
            raise Interrupted(f"Stopped at step {step}; the same command goes on.")


@contextlib.contextmanager
def finish_steps() -> Iterator[Stop]:
    """Within it, a signal waits until the loop calls `Stop.asked` and `Stop.here`.

        with finish_steps() as interrupt:
            for step in range(first, last):
                state = train_step(state)
                if interrupt.asked() or is_time_to_save():
                    checkpoint.save(checkpoints, step + 1, state)
                interrupt.here(step + 1)

    Raises:
        Interrupted: by `here`, or at the end if a signal came after the last step.
    """
    _asked.in_steps = True
    try:
        yield Stop()
    finally:
        _asked.in_steps = False
    if _asked.signal is not None:
        _interrupt()


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Within it, an interruption says that the same command goes on."""
    _asked.resumable = True
    try:
        yield
    finally:
        _asked.resumable = False


def _interrupt() -> None:
    _asked.ending = True
    raise Interrupted(_farewell())


def _farewell() -> str:
    return "Stopped; the same command goes on." if _asked.resumable else "Stopped."


def _handle(number: int, frame: Any) -> None:
    """In the main thread, as soon as it runs Python again."""
    if _asked.signal is None:
        _asked.signal = number
        if not _asked.in_steps:
            _interrupt()


@contextlib.contextmanager
def _answered_signals() -> Iterator[None]:
    """Handles SIGINT and SIGTERM, unless they are ignored, as by nohup."""
    global _asked
    _asked = _Asked()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _asked.wakeup = reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, _asked), daemon=True).start()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        if _asked.signal is None:  # otherwise the process is ending: a second one may
            for number, handler in before.items():  # come while threads are joined
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()  # ends the thread


def _watch(reader: socket.socket, asked: _Asked) -> None:
    """In a thread of its own, at once: answers a signal, and obeys a second one."""
    first = None
    with reader:
        while received := reader.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if first is not None:
                _exit(number)
            first = number
            if asked.in_steps:
                text = (
                    "Stopping when this step is saved. A second signal stops at once."
                )
                os.write(2, f"{text}\n".encode())
            else:
                _later(_exit_if_busy, number, asked)


def _later(function: Callable[..., Any], *args: Any) -> None:
    timer = threading.Timer(GRACE, function, args)
    timer.daemon = True
    timer.start()


def _exit_if_busy(number: int, asked: _Asked) -> None:
    if not (asked.ending or asked.in_steps):
        _exit(number)


def _exit_soon(status: int) -> None:
    """Ends a process that waits for a program which nobody needs any more."""
    _later(os._exit, status)


def _exit(number: int) -> None:
    """Ends the process from any thread. What is on disk is complete."""
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
    os.write(2, f"{_farewell()}\n".encode())
    os._exit(128 + number)
