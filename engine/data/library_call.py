"""Call the `tokenizers` library: every failure is a ValueError, and Ctrl-C ends a long call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
REPORT_S = 10.0
_END_S = 1.0  # time for the thread to leave Python code after Ctrl-C


def call(function: Callable[..., T], *args, **options) -> T:
    """Call a function of the library.

    Raises:
        ValueError: it fails. A Rust panic, such as of a regular expression that takes too long, is a BaseException.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        surrogate = any(isinstance(text, str) and not _is_utf8(text) for text in _flat(args))
        reason = "got a lone surrogate, expected text in UTF-8" if surrogate else f"got {error}"
        raise ValueError(f"tokenizer: {reason}") from None


def submit(function: Callable[..., T], *args, **options) -> Future[T]:
    """Begin `call` in another thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(function, *args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tokenizers", daemon=True).start()
    return future


def call_interruptibly(
    function: Callable[..., T], *args, report: Callable[[float], None] = lambda seconds: None,
    stop: threading.Event | None = None, **options,
) -> T:  # fmt: skip
    """As `call`, in another thread: the library does not see Ctrl-C, and the main thread does while it waits.

    Args:
        report: called every 10 s with the seconds since the start.
        stop: set when the wait is interrupted, so that an iterator that the library reads can end.
    """
    future, seconds = submit(function, *args, **options), 0.0
    try:
        while not wait([future], timeout=REPORT_S).done:
            seconds += REPORT_S
            report(seconds)
    except BaseException:
        if stop is not None:
            stop.set()
        wait([future], timeout=_END_S)
        raise
    return future.result()


def _flat(values: tuple) -> list:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
