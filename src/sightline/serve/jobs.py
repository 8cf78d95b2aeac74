"""A bounded queue in front of the one thread that uses the model, with progress, cancel, and results for a while."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from sightline.facts import Progress, duration

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Work = Callable[[Progress], Any]


class Full(Exception):
    """As many jobs wait as may."""


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Job:
    """One piece of work, from waiting to its result."""

    def __init__(self, work: Work) -> None:
        self.id = secrets.token_urlsafe(12)
        self.work: Work | None = work
        self.state: State = "waiting"
        self.what, self.done, self.total = "", 0, 0
        self.begun, self.since, self.ended = 0.0, 0.0, 0.0
        self.is_cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.over: Future[None] = Future()

    @property
    def seconds(self) -> float:
        """How long it runs, or ran."""
        return (self.ended or time.monotonic()) - self.begun if self.begun else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that what it does now will still take; None if that cannot be told."""
        done, total = self.done, self.total  # the other thread may begin to count anew
        if self.state != "running" or not 0 < done < total:
            return None
        return (time.monotonic() - self.since) / done * (total - done)

    def run(self, seconds: float) -> None:
        """Do the work, for so many seconds at most."""
        self.begun = self.since = time.monotonic()
        self.state = "running"

        def progress(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if self.is_cancelled:
                raise Cancelled
            if now - self.begun > seconds:
                raise TimeoutError(
                    f"expected a job of at most {duration(seconds)}, got {done} of {total} done then ({what}); ask for "
                    "fewer images or faster methods"
                )
            if what != self.what or done < self.done:
                self.since = now
            self.what, self.done, self.total = what, done, total

        try:
            assert self.work is not None
            result = self.work(progress)
        except Cancelled:
            self.end("cancelled")
        except BaseException as error:
            error.__cause__ = error.__context__ = None  # their frames hold the images
            self.end("failed", error=error.with_traceback(None))
        else:
            self.end("cancelled") if self.is_cancelled else self.end("done", result)

    def end(self, state: State, result: Any = None, error: BaseException | None = None) -> None:
        """Keep the result, or why there is none, and nothing else."""
        self.work, self.result, self.error, self.state = None, result, error, state
        self.ended = time.monotonic()
        self.over.set_result(None)


class Jobs:
    """Waiting, running and finished jobs, and the thread that runs them in order of arrival."""

    def __init__(
        self,
        waiting: int = 32,
        seconds: float = 600.0,
        *,
        kept: int = 100,
        kept_seconds: float = 600.0,
        kept_bytes: int = 2**28,
    ) -> None:
        """An empty queue.

        Args:
            waiting: most jobs that wait.
            seconds: most that a job runs.
            kept: most finished jobs that are remembered.
            kept_seconds: how long they are.
            kept_bytes: most that their results may take; the last one is kept whatever its size.
        """
        self.limit, self.seconds = waiting, seconds
        self.kept, self.kept_seconds, self.kept_bytes = kept, kept_seconds, kept_bytes
        self.known: dict[str, Job] = {}
        self.queue: deque[Job] = deque()
        self.running: Job | None = None
        self.change = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run, name="sightline jobs", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self.queue)

    def check_room(self) -> None:
        """Raise if no job can be taken.

        Raises:
            Full: as many wait as may, or the queue is closed.
        """
        if self.waiting >= self.limit or self.is_closed:
            raise Full

    def submit(self, work: Work, keep: bool = False) -> Job:
        """Put work into the queue; `keep`: its job can be asked for by its id, and its result is bytes.

        Raises:
            Full: as many wait as may, or the queue is closed.
        """
        job = Job(work)
        with self.change:
            self.check_room()
            self.queue.append(job)
            if keep:
                self._forget()
                self.known[job.id] = job
            self.change.notify()
        return job

    def get(self, id: str) -> Job | None:
        """A job that is kept."""
        with self.change:
            self._forget()
            return self.known.get(id)

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, at its next progress call if it runs; forget it if it is over."""
        with self.change:
            job.is_cancelled = True
            if job.over.done():
                self.known.pop(job.id, None)
            if job in self.queue:
                self.queue.remove(job)
                job.end("cancelled")

    def close(self) -> None:
        """Cancel all jobs, and let the thread end."""
        with self.change:
            self.is_closed = True
            while self.queue:
                self.queue.popleft().end("cancelled")
            if self.running is not None:
                self.running.is_cancelled = True
            self.change.notify()

    def _forget(self) -> None:
        """Forget finished jobs while they are too old, too many or too large, the oldest first."""
        over = sorted((job for job in self.known.values() if job.over.done()), key=lambda job: job.ended)
        total = sum(len(job.result or b"") for job in over)
        while over and (
            len(over) > self.kept
            or (total > self.kept_bytes and len(over) > 1)
            or time.monotonic() - over[0].ended > self.kept_seconds
        ):
            job = over.pop(0)
            total -= len(job.result or b"")
            del self.known[job.id]

    def _run(self) -> None:
        while True:
            with self.change:
                self.running = None
                while not self.queue and not self.is_closed:
                    self.change.wait(self.kept_seconds / 10 if self.known else None)
                    self._forget()
                if self.is_closed:
                    return
                self.running = job = self.queue.popleft()
            job.run(self.seconds)
            del job  # its result holds the images
