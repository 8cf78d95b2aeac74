"""The engine of one process: a plain loop over shards. The next one is decoded in another process meanwhile."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sightline.scale.decoding import TRIES, Decoded, Failed, Job, decode, search_lethal

if TYPE_CHECKING:
    from sightline.report.networks import ExplainedNetwork
    from sightline.scale.shards import Done


class Died(RuntimeError):
    """The decoding process died."""


class Decoder:
    """Decodes in a process of its own, which an image may kill; then it is started again."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads = job, threads
        self.is_closed = False
        self._start()

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # so that another one starts at once
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.job, self.threads), daemon=True)
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
        except (EOFError, OSError):  # errors of the decoding come as answers
            self._process.join()
            self._connection.close()
            if not self.is_closed:
                self._start()
            raise Died(f"the process that decoded shard {shard} died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def surely(self, shard: int, lethal: Sequence[int] = (), part: Sequence[int] | None = None) -> Decoded:
        """The same without the images on which the process dies, which are looked for if it died `TRIES` times.

        Raises:
            Died: the process dies, and not of one image.
            OSError: a source cannot be reached.
        """
        for _ in range(TRIES):
            with suppress(Died):
                return self(shard, lethal, part)
        search = search_lethal(range(self.job.size(shard)) if part is None else part)
        tried = next(search)
        try:
            while True:
                try:
                    self(shard, lethal, tried)
                    tried = search.send(True)
                except Died:
                    tried = search.send(False)
        except StopIteration as end:
            return self(shard, [*lethal, *end.value], part)

    def close(self) -> None:
        """End the process."""
        self.is_closed = True
        self._process.kill()


def _serve(connection: Connection, job: Job, threads: int) -> None:
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):  # the other process has ended
        while True:
            shard, lethal, part = connection.recv()
            try:
                answer: Any = decode(job, shard, lethal, part, threads)
            except (OSError, ValueError) as error:
                answer = error
            connection.send(answer)


def run(job: Job, network: "ExplainedNetwork", shards: Iterable[int]) -> "Iterator[Done | Failed]":
    """Write shards one after the other; while one is explained, the next is decoded.

    Raises:
        OSError: the disk is full, or a source cannot be reached.
        ValueError, RuntimeError: the network or a method fails.
    """
    from sightline.scale.shards import write

    def finished(shard: int, coming: Future[Decoded]) -> "Done | Failed":
        try:
            return write(job, network, coming.result())
        except Died as error:
            return Failed(shard, str(error))

    with closing(Decoder(job, os.cpu_count() or 1)) as decoder, ThreadPoolExecutor(1) as ahead:
        coming: tuple[int, Future[Decoded]] | None = None
        try:
            for shard in shards:
                following = (shard, ahead.submit(decoder.surely, shard))
                if coming is not None:
                    yield finished(*coming)
                coming = following
            if coming is not None:
                yield finished(*coming)
        finally:
            decoder.close()  # before the thread that waits for it is waited for
