"""Settings of the whole process while it trains: signals, TF32, limits of torch.compile."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import torch


@contextmanager
def tf32() -> Generator[None]:
    """Matrix products on a GPU in TF32, like its convolutions, unless the user has set their precision."""
    try:
        default = torch.cuda.is_available() and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised if the precision was set by its newer names, `fp32_precision`
        default = False
    if default:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if default:
            torch.set_float32_matmul_precision("highest")


@contextmanager
def many_graphs() -> Generator[None]:
    """Compile networks of many sizes in one process, as a study does; PyTorch gives up after eight."""
    from torch import _dynamo

    with _dynamo.config.patch(recompile_limit=max(_dynamo.config.recompile_limit, 128)):
        yield


@contextmanager
def stop_requests() -> Generator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one stops at once, in the middle of a step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, handlers[signal.Signals(number)])

    for number in handlers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
