"""Sessions: streams of tokens over one shared engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from armt import _core
from armt.errors import InvalidArgument, StateError
from armt.ids import IdArray, TokenIds, as_ids
from armt.progress import ProgressLike, reporting

if TYPE_CHECKING:
    from armt.engine import Engine

Logits: TypeAlias = Literal["none", "last", "all"]
LogitsOn: TypeAlias = Literal["host", "device"]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepOutput:
    """What a call that reads tokens returns."""

    logits: FloatArray | None
    """``last``: [vocab]; ``all``: [tokens, vocab], float32; ``none``: None."""
    tokens: int
    """Tokens read by the call."""
    device_logits: _core.DeviceArray | None = None
    """The same in the engine's device memory, in place of ``logits``, if ``logits_on="device"``:
    for ``torch.from_dlpack``, which copies nothing."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see :meth:`Session.generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def compiled(self) -> _core.SamplingParams:
        """Checked by the engine; raises InvalidArgument."""
        try:
            return _core.SamplingParams(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            )
        except TypeError as error:
            raise InvalidArgument(f"sampling: {self}: a setting has the wrong type") from error


@dataclass
class StopRule:
    """Ends a generation at one of some tokens or token sequences."""

    ids: frozenset[int]
    sequences: tuple[tuple[int, ...], ...]
    tail: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Sequence[int] | int | None, sequences: Sequence[Sequence[int]]) -> StopRule:
        if ids is None:
            ids = ()
        elif isinstance(ids, (int, np.integer)):
            ids = (int(ids),)
        parts = tuple(tuple(int(t) for t in sequence) for sequence in sequences)
        if any(not part for part in parts):
            raise InvalidArgument("stop_sequences: found an empty sequence, expected token ids")
        return cls(frozenset(int(i) for i in ids), parts)

    def hit(self, token: int) -> bool:
        """Takes note of ``token``; True if it ends the generation."""
        if token in self.ids:
            return True
        if not self.sequences:
            return False
        self.tail.append(token)
        del self.tail[: -max(len(part) for part in self.sequences)]
        return any(tuple(self.tail[-len(part) :]) == part for part in self.sequences)


class Generation(Iterator[int]):
    """Yields generated tokens; a token has been read into the session when it is yielded."""

    def __init__(
        self,
        session: Session,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: StopRule,
        rollover: bool,
    ) -> None:
        self._session = session
        self._left = max_new_tokens
        self._params = sampling.compiled()
        self._stop = stop
        self._grow = not rollover
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        """Natural logarithm of the model's own probability of each token."""
        self.finish_reason: Literal["length", "stop"] | None = None

    def __next__(self) -> int:
        if self.finish_reason is not None:
            raise StopIteration
        if self._left == 0:
            self.finish_reason = "length"
            raise StopIteration
        core = self._session._core
        ((token, logprob),) = _core.choose([core], [self._params])
        _core.run_many([(core, np.array([token], np.int32))], "none", False, True, self._grow, None)
        self._left -= 1
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._stop.hit(token):
            self.finish_reason = "stop"
        return token


class Session:
    """One stream of tokens with its own memory.

    Made by :meth:`armt.Engine.session`. Any number of threads may use distinct sessions of one
    engine; using one session from two threads at once raises StateError in the second.
    """

    def __init__(self, engine: Engine, core: _core.Session) -> None:
        self._engine = engine
        self._core = core

    @property
    def engine(self) -> Engine:
        """The engine that this session runs on."""
        return self._engine

    @property
    def tokens(self) -> int:
        """Tokens read so far, fed and generated."""
        return self._core.tokens

    @property
    def segments(self) -> int:
        """Segments closed so far, that is, written to memory."""
        return self._core.segments

    @property
    def open_tokens(self) -> int:
        """Tokens in the open segment."""
        return self._core.open_tokens

    @property
    def version(self) -> int:
        """Counts the calls that changed this session: for compare-and-set in a store."""
        return self._core.version

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._core.closed

    @property
    def logits(self) -> FloatArray:
        """[vocab] float32: logits of the last token read."""
        return self._core.last_logits()

    @property
    def state(self) -> _core.State:
        """A frozen copy of the whole state, cheap until the session moves on."""
        return self._core.snapshot()

    def feed(
        self,
        tokens: TokenIds,
        *,
        logits: Logits = "none",
        logits_on: LogitsOn = "host",
        write: bool = True,
        progress: ProgressLike = None,
    ) -> StepOutput:
        """Reads ``tokens`` [tokens], any number of them, into the stream.

        ``logits_on="device"`` leaves the logits in the engine's device memory.

        The last segment stays open, even when it is exactly full. With ``write=False`` the session
        is left as it was. All or nothing: after any error, Ctrl-C included, the session is as
        before the call.
        """
        ids = as_ids(tokens, engine=self._engine._core)
        with reporting(progress, total=len(ids)) as report:
            (out,) = run_rows(
                [(self._core, ids)],
                logits=logits,
                logits_on=logits_on,
                one_segment=False,
                write=write,
                report=report,
            )
        return out

    def step(
        self,
        segment: TokenIds,
        *,
        logits: Logits = "last",
        logits_on: LogitsOn = "host",
        write: bool = True,
    ) -> StepOutput:
        """Reads 1 .. segment_size tokens as one whole segment and closes it.

        An open segment from before is closed first.
        """
        ids = as_ids(segment, engine=self._engine._core)
        (out,) = run_rows(
            [(self._core, ids)],
            logits=logits,
            logits_on=logits_on,
            one_segment=True,
            write=write,
            report=None,
        )
        return out

    def close_segment(self) -> None:
        """Writes the open segment to memory; does nothing if none is open."""
        self._core.close_segment()

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] | int | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        rollover: bool = True,
        write: bool = True,
    ) -> Generation:
        """Continues the stream; iterate over the result to get the tokens as they come.

        ``temperature=0`` is greedy. ``seed`` starts a new sequence of draws (the same tokens on
        every platform); without it the session's sequence goes on. A stop token or the last token
        of a stop sequence is yielded and ends the generation. When the open segment is full it is
        closed and a new one begins; with ``rollover=False`` it grows instead, as in the published
        code, up to the model's position limit. ``write=False`` leaves the session as it was. The
        repetition penalty looks at the open and the previous segment.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)):
            raise InvalidArgument(f"max_new_tokens: found {max_new_tokens!r}, expected an integer")
        if max_new_tokens < 0:
            raise InvalidArgument(f"max_new_tokens: found {max_new_tokens}, expected 0 or more")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        session = self if write else self.fork()
        generation = Generation(
            session,
            max_new_tokens=int(max_new_tokens),
            sampling=sampling,
            stop=StopRule.of(stop_ids, stop_sequences),
            rollover=rollover,
        )
        if self._core.tokens == 0 and max_new_tokens > 0:
            raise InvalidArgument("generate: the session has read no token yet; feed at least one")
        if seed is not None:
            session._core.set_seed(check_seed(seed))
        return generation

    def score(
        self, tokens: TokenIds, *, write: bool = True, progress: ProgressLike = None
    ) -> npt.NDArray[np.float64]:
        """[tokens] float64: natural log-likelihood of each token given all before it.

        One streaming pass; only one segment's rows are held, whatever the length. The first entry
        is NaN if the session had read nothing. The tokens are read into the session unless
        ``write=False``.
        """
        ids = as_ids(tokens, engine=self._engine._core)
        with reporting(progress, total=len(ids)) as report:
            return self._core.score(ids, write, report)

    def fork(self) -> Session:
        """An independent session that continues from here; memory is shared until one writes."""
        return Session(self._engine, self._core.fork())

    def checkpoint(self) -> _core.State:
        """The state now, for :meth:`rollback` of this session."""
        return self._core.snapshot()

    def rollback(self, checkpoint: _core.State) -> None:
        """Goes back to a checkpoint of this session; StateError for any other."""
        if not isinstance(checkpoint, _core.State):
            raise StateError(
                f"rollback: found {type(checkpoint).__name__}, expected what checkpoint() returned"
            )
        self._core.rollback(checkpoint)

    def reset(self) -> None:
        """Forgets everything: an empty memory and no open segment."""
        self._core.reset()

    def close(self, *, wipe: bool = False) -> None:
        """Frees the state; any later use raises StateError. Closing twice is fine.

        ``wipe=True`` overwrites it with zeros first, as far as no fork or checkpoint shares it.
        Copies that a caller took (bytes, logits) and scratch memory of the engine, which the next
        call overwrites, are not its business.
        """
        if not self._core.closed:
            self._core.close(wipe)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<armt.Session closed>"
        return f"<armt.Session tokens={self.tokens} segments={self.segments}>"


def run_rows(
    rows: Sequence[tuple[_core.Session, IdArray]],
    *,
    logits: Logits,
    logits_on: LogitsOn,
    one_segment: bool,
    write: bool,
    report: Callable[[int], object] | None,
) -> list[StepOutput]:
    """One batched pass over compiled sessions and their ids; logits where the caller wants them."""
    if logits_on not in ("host", "device"):
        raise InvalidArgument(f"logits_on: found {logits_on!r}, expected host or device")
    if logits_on == "device" and logits != "none":
        arrays = _core.run_on_device(rows, logits, one_segment, write, report)
        return [
            StepOutput(None, len(ids), array) for array, (_, ids) in zip(arrays, rows, strict=True)
        ]
    outputs = _core.run_many(rows, logits, one_segment, write, False, report)
    return [StepOutput(out, len(ids)) for out, (_, ids) in zip(outputs, rows, strict=True)]


def check_seed(seed: int) -> int:
    """``seed`` if it fits 64 bits without a sign."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InvalidArgument(f"seed: found {seed!r}, expected an integer")
    if not 0 <= seed < 2**64:
        raise InvalidArgument(f"seed: found {seed}, expected 0 .. 2**64 - 1")
    return int(seed)
