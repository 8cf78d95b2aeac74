"""The engine of one process: a plain loop over shards. The next one is decoded in another process meanwhile."""

import faulthandler
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


PATIENCE = 600.0
"""Seconds without a further image after which the decoding process ends: it hangs."""


class Died(RuntimeError):
    """The decoding process died."""


class Decoder:
    """Decodes in a process of its own, which an image may kill or hold up; then it is started again."""

    def __init__(self, job: Job, threads: int, patience: float = PATIENCE) -> None:
        self.job, self.threads, self.patience = job, threads, patience
        self.is_closed = False
        self._start()

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # so that another one starts at once
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self.job, self.threads, self.patience), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process ends the connection
        if self.is_closed:  # by another thread meanwhile
            self._process.kill()

    def __call__(self, shard: int, lethal: Sequence[int] = (), part: Sequence[int] | None = None) -> Decoded:
        """See `shards.decode`.

        Raises:
            Died: the process died, or was closed.
            OSError: a source cannot be reached.
        """
        if self.is_closed:
            raise Died("the process that decodes was closed")
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
            RuntimeError: it dies without any image, too.
            OSError: a source cannot be reached.
        """
        for _ in range(TRIES):
            with suppress(Died):
                return self(shard, lethal, part)
        try:
            self(shard, part=())
        except Died as error:
            raise RuntimeError(
                "the process that decodes images dies before the first one; give it more memory, and a script that "
                "calls explain_many the guard if __name__ == '__main__'"
            ) from error
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


def _serve(connection: Connection, job: Job, threads: int, patience: float) -> None:
    # the other process may have ended
    with suppress(EOFError, ConnectionError, KeyboardInterrupt), open(os.devnull, "w") as nowhere:

        def alive() -> None:
            faulthandler.dump_traceback_later(patience, exit=True, file=nowhere)

        while True:
            shard, lethal, part = connection.recv()
            try:
                answer: Any = decode(job, shard, lethal, part, threads, alive)
            except Exception as error:  # what is no fault of an image must not be blamed on one
                answer = error
            faulthandler.cancel_dump_traceback_later()
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
