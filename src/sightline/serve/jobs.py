"""A bounded queue in front of one thread that works for the model, with progress, cancel, and results for a while."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from sightline.facts import Progress

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Work = Callable[[Sequence[Any], Progress], Sequence[Any]]
"""Makes the results of several items."""


class Full(Exception):
    """As many jobs wait as may."""


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Job:
    """One item of work, from waiting to its result."""

    def __init__(self, work: Work, item: Any, like: Hashable, size: int) -> None:
        self.id = secrets.token_urlsafe(12)
        self.work, self.item, self.like, self.size = work, item, like, size
        self.state: State = "waiting"
        self.what, self.done, self.total = "", 0, 0
        self.begun, self.ended, self.since = 0.0, 0.0, 0.0
        self.is_cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.over: Future[None] = Future()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return (self.ended or time.monotonic()) - self.begun if self.begun else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that what it does now will take, as far as that can be told."""
        if self.state != "running" or not 0 < self.done < self.total:
            return None
        return (time.monotonic() - self.since) / self.done * (self.total - self.done)

    def tell(self, what: str, done: int, total: int) -> None:
        """Note the progress."""
        if what != self.what or done < self.done:
            self.since = time.monotonic()
        self.what, self.done, self.total = what, done, total

    def end(self, state: State, result: Any = None, error: BaseException | None = None) -> None:
        """Note the result, or why there is none."""
        self.item = None
        self.state, self.result, self.error = state, result, error
        self.ended = time.monotonic()
        self.over.set_result(None)


class Jobs:
    """Waiting, running and finished jobs, and the thread that runs them in order of arrival."""

    def __init__(
        self,
        limit: int = 32,
        seconds: float = 600.0,
        together: int = 16,
        kept: int = 100,
        kept_seconds: float = 600.0,
        kept_bytes: int = 2**28,
    ) -> None:
        """An empty queue.

        Args:
            limit: most jobs that wait.
            seconds: most that a job runs.
            together: most images of jobs that are run together.
            kept: most finished jobs that can be asked for.
            kept_seconds: how long they can be.
            kept_bytes: most that their results may take.
        """
        self.limit, self.seconds, self.together = limit, seconds, together
        self.kept, self.kept_seconds, self.kept_bytes = kept, kept_seconds, kept_bytes
        self.known: dict[str, Job] = {}
        self.queue: deque[Job] = deque()
        self.running: Sequence[Job] = ()
        self.change = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run, name="sightline-jobs", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self.queue)

    def check_room(self) -> None:
        """Raise early if a job could not be taken.

        Raises:
            Full: as many wait as may.
        """
        if self.waiting >= self.limit or self.is_closed:
            raise Full

    def submit(self, work: Work, item: Any, like: Hashable = None, size: int = 1, keep: bool = False) -> Job:
        """Put a job into the queue; those that are equal in `work` and `like` may be run together.

        Raises:
            Full: as many wait as may.
        """
        job = Job(work, item, like, size)
        with self.change:
            self.check_room()
            self.queue.append(job)
            if keep:
                self._forget()
                self.known[job.id] = job
            self.change.notify()
        return job

    def get(self, id: str) -> Job | None:
        """A job that was kept."""
        with self.change:
            self._forget()
            return self.known.get(id)

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, at its next progress call if it runs."""
        with self.change:
            job.is_cancelled = True
            if job in self.queue:
                self.queue.remove(job)
                job.end("cancelled")

    def close(self) -> None:
        """Cancel all jobs and let the thread end."""
        with self.change:
            self.is_closed = True
            for job in [*self.queue, *self.running]:
                job.is_cancelled = True
            while self.queue:
                self.queue.popleft().end("cancelled")
            self.change.notify()

    def _forget(self) -> None:
        """Forget finished jobs that are old, too many or too large, the oldest first."""
        over = [job for job in self.known.values() if job.over.done()]
        over.sort(key=lambda job: job.ended)
        total = sum(len(job.result or b"") for job in over)
        now = time.monotonic()
        while over and (now - over[0].ended > self.kept_seconds or len(over) > self.kept or total > self.kept_bytes):
            job = over.pop(0)
            total -= len(job.result or b"")
            del self.known[job.id]

    def _run(self) -> None:
        while True:
            with self.change:
                while not self.queue and not self.is_closed:
                    self.change.wait()
                if self.is_closed:
                    return
                jobs = self._next()
                self.running = jobs
            self._work(jobs)
            self.running = ()

    def _next(self) -> list[Job]:
        """The first job, and others that can be run together with it."""
        jobs = [self.queue.popleft()]
        size = jobs[0].size
        for job in [*self.queue] if jobs[0].like is not None else ():
            if (job.work, job.like) == (jobs[0].work, jobs[0].like) and size + job.size <= self.together:
                self.queue.remove(job)
                jobs.append(job)
                size += job.size
        return jobs

    def _work(self, jobs: Sequence[Job]) -> None:
        begun = time.monotonic()
        for job in jobs:
            job.state, job.begun, job.since = "running", begun, begun

        def progress(what: str, done: int, total: int) -> None:
            if all(job.is_cancelled for job in jobs):
                raise Cancelled
            if time.monotonic() - begun > self.seconds:
                raise TimeoutError(
                    f"expected a job of at most {self.seconds:g} s, got {done} of {total} done ({what}) in this time; "
                    "ask for fewer images or faster methods"
                )
            for job in jobs:
                job.tell(what, done, total)

        try:
            progress("", 0, 0)
            results = jobs[0].work([job.item for job in jobs], progress)
        except Cancelled:
            for job in jobs:
                job.end("cancelled")
        except BaseException as error:
            if len(jobs) == 1 or isinstance(error, TimeoutError):
                for job in jobs:
                    job.end("failed", error=error)
            else:  # one of them is to blame
                for job in jobs:
                    self._work([job])
        else:
            for job, result in zip(jobs, results, strict=True):
                job.end("cancelled") if job.is_cancelled else job.end("done", result)
