"""The one thread that runs the engine: concurrent requests become rows of common passes.

A pass takes one token of every answer that is being generated and pieces of the inputs that are
being read, all in one call of the engine. A row's result does not depend on its neighbours or on
where its input is cut, so neither does any answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from armt import _core
from armt.engine import Engine
from armt.server.errors import ApiError, as_api_error
from armt.server.jobs import Decode, FinishReason, Ids, Job, Read, Token, top_logprobs
from armt.session import FloatArray, Session

log = logging.getLogger("armt.server")

SMALLEST_PIECE = 64
"""Tokens of one input that are worth a row of their own."""
SHORT = 64
"""Tokens of an input, such as a question, that need not wait behind long ones."""
READ_SECONDS = 0.1
"""About how long a pass may take when nobody is being answered."""


@dataclass
class Row:
    """One session's part of a pass."""

    job: Read | Decode
    ids: Ids
    finish: FinishReason | None = None
    """Of a generation that ends with this token."""


@dataclass
class Totals:
    """What the engine's thread has done, and has to do, for metrics."""

    reading: int = 0
    decoding: int = 0
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0
    read: int = 0
    generated: int = 0


class Scheduler:
    """Owns the engine's thread. Made anywhere; :meth:`start` is called in the event loop."""

    def __init__(self, engine: Engine, *, max_batch: int, pause: float) -> None:
        self.totals = Totals()
        self._engine = engine
        self._max_batch = max_batch
        self._pause = pause
        self._inbox: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._reads: deque[Read] = deque()
        self._decodes: deque[Decode] = deque()
        self._posts: list[Callable[[], None]] = []
        self._speed = engine.segment_size / READ_SECONDS
        self._thread = threading.Thread(target=self._run, name="armt-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Starts the thread; answers go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; what is not done yet fails."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    # ------------------------------------------------------------ event loop's side

    async def read(
        self,
        session: Session,
        ids: Ids,
        *,
        logits: Literal["none", "all"] = "none",
        close: bool = False,
    ) -> FloatArray | None:
        """Reads ``ids`` [tokens] into ``session``; with ``close`` the open segment is then written.

        Returns [tokens, vocab] with ``logits="all"``, for inputs of a bounded length. If the
        waiting task is cancelled, the session is left somewhere in between.
        """
        assert self._loop is not None
        result: asyncio.Future[FloatArray | None] = self._loop.create_future()
        job = Read(session, ids, result, logits=logits, close=close)
        self._submit(job)
        try:
            return await result
        finally:
            job.cancelled = True

    def decode(self, job: Decode) -> Decode:
        """Starts a generation; iterate over ``job.tokens()``, set ``job.cancelled`` to end it.

        Raises InvalidArgument for impossible sampling settings.
        """
        job.params = job.sampling.compiled()
        self._submit(job)
        return job

    def _submit(self, job: Job) -> None:
        with self._wake:
            if self._stopping:
                raise ApiError("shutting_down", "the server is stopping; try again later")
            self._inbox.append(job)
            self._wake.notify()

    # --------------------------------------------------------- engine thread's side

    def _run(self) -> None:
        while self._take():
            try:
                self._pass()
            except Exception as error:  # our bug: whoever waits is told, and the thread goes on
                log.exception("a pass of the engine failed")
                self._fail_all(error)
            self._count_jobs()
            self._deliver()
        self._fail_all(ApiError("shutting_down", "the server stopped before the answer was done"))
        self._deliver()

    def _take(self) -> bool:
        """Sorts new jobs in; sleeps while there are none; False at the end."""
        with self._wake:
            while not (self._inbox or self._reads or self._decodes or self._stopping):
                self._wake.wait()
            new, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for job in new:
            if isinstance(job, Read):
                self._reads.append(job)
            elif isinstance(job, Decode) and len(job.prompt):
                self._reads.append(Read(job.session, job.prompt, then=job))
            elif isinstance(job, Decode):
                self._decodes.append(job)
        self._decodes = deque(job for job in self._decodes if not job.unwanted)
        self._reads = deque(job for job in self._reads if not job.unwanted)
        self._count_jobs()
        return not stopping

    def _count_jobs(self) -> None:
        self.totals.reading, self.totals.decoding = len(self._reads), len(self._decodes)

    def _pass(self) -> None:
        start = time.monotonic()
        rows = self._chosen()
        self._deliver()  # whoever waits for a token need not wait for the rest of the pass
        pieces = self._pieces(max(self._max_batch - len(rows), 1))
        plain = [Row(job, ids) for job, ids in pieces if job.logits == "none"]
        self._execute([*rows, *plain])
        for job, ids in pieces:
            if job.logits == "all":
                self._execute([Row(job, ids)], logits="all")
        for empty in [job for job in self._reads if job.left == 0]:
            self._reads.remove(empty)
            self._finish_read(empty, None)
        self._count(len(rows) + len(plain), sum(len(ids) for _, ids in pieces), start)

    def _count(self, rows: int, read: int, start: float) -> None:
        seconds = time.monotonic() - start
        totals = self.totals
        totals.passes += 1
        totals.rows += rows
        totals.seconds += seconds
        totals.read += read
        if read >= SMALLEST_PIECE and seconds > 0:
            self._speed += 0.3 * (read / seconds - self._speed)

    # ---- generating

    def _chosen(self) -> list[Row]:
        """A new token for each answer, as rows to be read."""
        jobs = [self._decodes.popleft() for _ in range(min(self._max_batch, len(self._decodes)))]
        rows = []
        for job, token in self._choose(jobs):
            finish = job.ends_with(token)
            self.totals.generated += 1
            if finish is not None and not job.keep:
                self._hand_over(job, finish)
                continue
            if finish is None and job.eager:
                self._hand_over(job, None)
            rows.append(Row(job, np.array([token.id], np.int32), finish))
        return rows

    def _choose(self, jobs: list[Decode]) -> list[tuple[Decode, Token]]:
        params = []
        for job in jobs:
            assert job.params is not None
            params.append(job.params)
        try:
            tops = [top_logprobs(job.session.logits, job.top) if job.top else () for job in jobs]
            choices = _core.choose([job.session._core for job in jobs], params)
        except Exception as error:
            if len(jobs) > 1:
                return [pair for job in jobs for pair in self._choose([job])]
            self._fail(jobs[0], error)
            return []
        return [
            (job, Token(token, logprob, top))
            for job, (token, logprob), top in zip(jobs, choices, tops, strict=True)
        ]

    def _hand_over(self, job: Decode, finish: FinishReason | None) -> None:
        tokens, job.held = job.held, []
        self._posts.append(partial(job.came, tokens, finish))

    # ---- reading

    def _pieces(self, most: int) -> list[tuple[Read, Ids]]:
        """What is read in this pass: whoever waits longest, then short inputs, then the others.

        Each gets at least a segment, for parts of segments cost more, and at most its share.
        """
        budget = int(self._speed * (self._pause if self._decodes else READ_SECONDS))
        jobs = [job for job in self._reads if job.left]
        jobs[1:] = sorted(jobs[1:], key=lambda job: job.left > SHORT)
        pieces: list[tuple[Read, Ids]] = []
        for i, job in enumerate(jobs[:most]):
            if budget <= 0:
                break
            share = max(budget // (len(jobs) - i), self._engine.segment_size)
            take = self._aligned(job, min(share, max(budget, SMALLEST_PIECE), job.left))
            take = job.left if job.logits == "all" else take
            budget -= take
            pieces.append((job, job.ids[job.read : job.read + take]))
        return pieces

    def _aligned(self, job: Read, count: int) -> int:
        """``count``, or less where that ends with a segment."""
        if count == job.left:
            return count
        size, opened = self._engine.segment_size, job.session.open_tokens
        boundary = (opened + count) // size * size - opened
        return boundary if boundary > 0 else count

    def _execute(self, rows: list[Row], logits: Literal["none", "all"] = "none") -> None:
        """Reads every row; a fault is charged to the row that causes it."""
        if not rows:
            return
        try:
            outputs = self._engine.feed_many(
                [(row.job.session, row.ids) for row in rows], logits=logits
            )
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0].job, error)
                return
            for row in rows:
                self._execute([row], logits)
            return
        for row, output in zip(rows, outputs, strict=True):
            self._after(row, output.logits)

    def _after(self, row: Row, logits: FloatArray | None) -> None:
        job = row.job
        if isinstance(job, Decode):
            if row.finish is None:
                self._decodes.append(job)
            else:
                self._hand_over(job, row.finish)
            return
        job.read += len(row.ids)
        self._reads.remove(job)
        if job.left:
            self._reads.append(job)
        else:
            self._finish_read(job, logits)

    def _finish_read(self, job: Read, logits: FloatArray | None) -> None:
        try:
            if job.close:
                job.session.close_segment()
        except Exception as error:
            self._fail(job, error)
            return
        if job.then is not None:
            self._decodes.append(job.then)
        else:
            self._posts.append(partial(job.done, logits))

    # ---- answers

    def _fail(self, job: Job, error: BaseException) -> None:
        """Drops a job; whoever waits for it gets the error."""
        if isinstance(job, Read) and job in self._reads:
            self._reads.remove(job)
        shown = as_api_error(error)
        if shown is not error and shown.status >= 500:
            log.error("the engine failed", exc_info=error)
        self._posts.append(partial(job.failed, shown))

    def _fail_all(self, error: BaseException) -> None:
        with self._wake:
            jobs: list[Job] = [*self._inbox, *self._reads, *self._decodes]
            self._inbox.clear()
        self._reads.clear()
        self._decodes.clear()
        for job in jobs:
            self._fail(job, error)

    def _deliver(self) -> None:
        """Hands all news to the event loop at once."""
        posts, self._posts = self._posts, []
        if not posts:
            return
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_call_all, posts)
        except RuntimeError:  # the event loop has ended; nobody waits any more
            log.debug("answers of a stopped server were dropped")


def _call_all(posts: list[Callable[[], None]]) -> None:
    for post in posts:
        post()
