"""The engine of one process: a plain loop over shards. The next one is decoded in another process meanwhile."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sightline.scale.decoding import TRIES, Decoded, Job, decode, search_lethal

if TYPE_CHECKING:
    from sightline.report.networks import ExplainedNetwork
    from sightline.scale.shards import Done


class Died(RuntimeError):
    """The decoding process died."""


class Decoder:
    """Decodes in a process of its own, which an image may kill; then it is started again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_closed = False
        self._start()

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # so that another one starts at once
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.job), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the connection

    def __call__(self, shard: int, lethal: Sequence[int] = (), part: Sequence[int] | None = None) -> Decoded:
        """See `shards.decode`.

        Raises:
            Died: the process died.
            OSError: a source cannot be reached.
        """
        try:
            self._connection.send((shard, lethal, part))
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            self._connection.close()
            if not self.is_closed:
                self._start()
            raise Died(f"the process that decoded shard {shard} died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def surely(self, shard: int) -> Decoded:
        """A whole shard, without the images on which the process dies.

        Raises:
            Died: the process dies, and not of one image.
            OSError: a source cannot be reached.
        """
        for _ in range(TRIES):
            with suppress(Died):
                return self(shard)
        search = search_lethal(range(self.job.size(shard)))
        part = next(search)
        try:
            while True:
                try:
                    self(shard, (), part)
                    part = search.send(True)
                except Died:
                    part = search.send(False)
        except StopIteration as end:
            return self(shard, end.value)

    def close(self) -> None:
        """End the process."""
        self.is_closed = True
        self._process.kill()


def _serve(connection: Connection, job: Job) -> None:
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):  # the other process has ended
        while True:
            shard, lethal, part = connection.recv()
            try:
                answer: Any = decode(job, shard, lethal, part, os.cpu_count() or 1)
            except (OSError, ValueError) as error:
                answer = error
            connection.send(answer)


def run(job: Job, network: "ExplainedNetwork", shards: Iterable[int]) -> "Iterator[Done]":
    """Write shards one after the other; while one is explained, the next is decoded.

    Raises:
        Died: the decoding process dies again and again.
        OSError: the disk is full, or a source cannot be reached.
    """
    from sightline.scale.shards import write

    with closing(Decoder(job)) as decoder, ThreadPoolExecutor(1) as ahead:
        coming: Future[Decoded] | None = None
        try:
            for shard in shards:
                following = ahead.submit(decoder.surely, shard)
                if coming is not None:
                    yield write(job, network, coming.result())
                coming = following
            if coming is not None:
                yield write(job, network, coming.result())
        finally:
            decoder.close()  # before the thread that waits for it is waited for
