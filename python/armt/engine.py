"""The engine: one model's weights on one device, shared by any number of sessions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from armt import _core
from armt.checkpoint import Checkpoint, load_checkpoint
from armt.errors import InvalidArgument, StateError
from armt.ids import TokenIds, as_array, as_ids, fetched, on_gpu
from armt.models import place
from armt.progress import ProgressLike, reporting
from armt.session import (
    FloatArray,
    Logits,
    LogitsOn,
    Sampling,
    Session,
    StepOutput,
    StopRule,
    check_seed,
    run_rows,
)

DType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Schedule: TypeAlias = Literal["auto", "sequential", "diagonal"]
OnNonfinite: TypeAlias = Literal["raise", "ignore"]
PrefillDType: TypeAlias = Literal["same", "fp8"]


@dataclass(frozen=True)
class ForwardOutput:
    """What :meth:`Engine.forward` returns."""

    logits: FloatArray | None
    """``all``: [batch, tokens, vocab]; ``last``: [batch, vocab], float32; ``none``: None."""
    states: list[_core.State]
    """The state of each row after its last segment was closed."""


class Engine:
    """One model on one device. Thread-safe: sessions of one engine may run in many threads."""

    def __init__(self, core: _core.Engine, checkpoint: Checkpoint) -> None:
        self._core = core
        self._checkpoint = checkpoint
        self._stream: Session | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: DType = "auto",
        threads: int = 0,
        schedule: Schedule = "auto",
        isa: str = "",
        on_nonfinite: OnNonfinite = "raise",
        prefill_dtype: PrefillDType = "same",
        memory_limit: int = 0,
        adapter: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> Engine:
        """Loads a checkpoint folder or file, or the model of the package: "demo".

        ``device``: "cpu", "cuda", "cuda:1" or "auto" (a GPU if this build can use one). ``dtype``
        is that of the weights; "auto" keeps bfloat16 weights and makes all others float32; state
        and CPU arithmetic are float32 always. ``threads=0`` uses all cores. ``isa`` forces a CPU
        instruction set ("baseline", "avx2", "avx512"). ``adapter`` is a separate LoRA folder.
        ``on_nonfinite="raise"`` turns infinities and NaNs that a call wrote or is about to hand out
        into a NonFiniteError; "ignore" only counts them (``stats()["nonfinite"]``).
        ``prefill_dtype="fp8"`` reads long inputs with 8-bit dense layers: less exact, faster for
        wide models and slower for small ones (GPT-2 small); for bfloat16 weights on GPUs of compute
        capability 9.0, a DeviceError elsewhere.
        ``memory_limit`` is the most bytes of a GPU's memory that the engine takes, 0: what there
        is. When it is used up, states of sessions that rest move to host memory and come back when
        they are used; OutOfMemory is raised when even that does not help.
        ``overrides`` give facts that a bare state dict lacks (``dialect=``, ``segment_size=`` ...).

        Raises CheckpointError for anything wrong with the files, DeviceError for the device.
        """
        checkpoint = load_checkpoint(place(path), adapter=adapter, **overrides)
        return cls.from_checkpoint(
            checkpoint,
            device=device,
            dtype=dtype,
            threads=threads,
            schedule=schedule,
            isa=isa,
            on_nonfinite=on_nonfinite,
            prefill_dtype=prefill_dtype,
            memory_limit=memory_limit,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: DType = "auto",
        threads: int = 0,
        schedule: Schedule = "auto",
        isa: str = "",
        on_nonfinite: OnNonfinite = "raise",
        prefill_dtype: PrefillDType = "same",
        memory_limit: int = 0,
    ) -> Engine:
        """An engine over a checkpoint that :func:`load_checkpoint` has read; options as for
        :meth:`from_pretrained`."""
        if dtype == "auto":
            weights = "bfloat16" if checkpoint.source_dtype == "bfloat16" else "float32"
        else:
            weights = dtype
        core = _core.Engine(
            decoder=checkpoint.decoder,
            memory=checkpoint.memory,
            device=device,
            dtype=weights,
            threads=threads,
            schedule=schedule,
            isa=isa,
            on_nonfinite=on_nonfinite,
            prefill_dtype=prefill_dtype,
            memory_limit=memory_limit,
        )
        for tensor in checkpoint.tensors():
            if tensor.array.ndim == 2:
                core.load_matrix(tensor.slot, tensor.layer, tensor.array, tensor.dtype)
            else:
                core.load_vector(tensor.slot, tensor.layer, tensor.array)
        core.finish_loading()
        return cls(core, checkpoint)

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> str:
        """Where the engine runs: "cpu" or "cuda:0"."""
        return self._core.device

    @property
    def description(self) -> str:
        """Device for people: instruction set and threads, or the GPU's name."""
        return self._core.description

    @property
    def dtype(self) -> str:
        """The weights' type."""
        return self._core.dtype

    @property
    def prefill_dtype(self) -> str:
        """ "fp8", or "same" where long inputs are read in the weights' type."""
        return self._core.prefill_dtype

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return self._core.vocab_size

    @property
    def segment_size(self) -> int:
        """Tokens of a full segment."""
        return self._core.segment_size

    @property
    def checkpoint(self) -> Checkpoint:
        """The files that the weights came from and the configuration found there."""
        return self._checkpoint

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made: tokens, segments, calls and the seconds in them.

        ``call_seconds`` has last, p50, p99 and greatest of the last 1,024 calls that read tokens (a
        step, feed or generated token each); ``state_bytes`` what all live states hold, shared parts
        once; ``spilled_bytes`` how much of that lies in host memory, because the GPU's is full;
        ``weight_bytes`` the weights; ``nonfinite`` how many infinities
        and NaNs were found so far.
        """
        return self._core.stats()

    def __repr__(self) -> str:
        return f"<armt.Engine {self._core.description}, {self.dtype}>"

    # ---------------------------------------------------------------- streams

    def session(self, *, state: _core.State | None = None, seed: int | None = None) -> Session:
        """A new stream, empty or continuing from ``state``; StateError if that does not fit."""
        if state is not None and not isinstance(state, _core.State):
            raise StateError(f"state: found {type(state).__name__}, expected an armt.State")
        core = _core.Session(self._core) if state is None else _core.Session(self._core, state)
        if seed is not None:
            core.set_seed(check_seed(seed))
        return Session(self, core)

    @property
    def stream(self) -> Session:
        """The session behind :meth:`step`, made when first used."""
        if self._stream is None:
            self._stream = self.session()
        return self._stream

    def step(
        self, segment: TokenIds, *, logits: Logits = "last", logits_on: LogitsOn = "host"
    ) -> StepOutput:
        """Reads 1 .. segment_size tokens as one segment of the engine's own stream; memory is
        written."""
        return self.stream.step(segment, logits=logits, logits_on=logits_on)

    def reset(self) -> None:
        """Empties the stream behind :meth:`step`."""
        if self._stream is not None:
            self._stream.reset()

    # ---------------------------------------------------------- many sessions

    def step_many(
        self,
        rows: Iterable[tuple[Session, TokenIds]],
        *,
        logits: Logits = "last",
        logits_on: LogitsOn = "host",
    ) -> list[StepOutput]:
        """One :meth:`Session.step` for each (session, ids), in one batched pass, all or nothing.

        Each result is bit-equal (CPU) to stepping that session alone.
        """
        return self._run_many(
            rows, logits=logits, logits_on=logits_on, one_segment=True, write=True, progress=None
        )

    def feed_many(
        self,
        rows: Iterable[tuple[Session, TokenIds]],
        *,
        logits: Logits = "none",
        logits_on: LogitsOn = "host",
        write: bool = True,
        progress: ProgressLike = None,
    ) -> list[StepOutput]:
        """One :meth:`Session.feed` for each (session, ids) of any lengths, in one batched pass."""
        return self._run_many(
            rows,
            logits=logits,
            logits_on=logits_on,
            one_segment=False,
            write=write,
            progress=progress,
        )

    def _run_many(
        self,
        rows: Iterable[tuple[Session, TokenIds]],
        *,
        logits: Logits,
        logits_on: LogitsOn,
        one_segment: bool,
        write: bool,
        progress: ProgressLike,
    ) -> list[StepOutput]:
        pairs = [(self._own(session), as_ids(ids, engine=self._core)) for session, ids in rows]
        total = sum(len(ids) for _, ids in pairs)
        with reporting(progress, total=total) as report:
            return run_rows(
                pairs,
                logits=logits,
                logits_on=logits_on,
                one_segment=one_segment,
                write=write,
                report=report,
            )

    def generate_many(
        self,
        sessions: Sequence[Session],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_ids: Sequence[int] | int | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        rollover: bool = True,
    ) -> list[list[int]]:
        """Continues every session, one batched pass a token; the new tokens of each session.

        Settings as for :meth:`Session.generate`; each session draws from its own sequence.
        """
        if max_new_tokens < 0:
            raise InvalidArgument(f"max_new_tokens: found {max_new_tokens}, expected 0 or more")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        cores = [self._own(session) for session in sessions]
        return self._continue(
            cores,
            max_new_tokens,
            sampling.compiled(),
            [StopRule.of(stop_ids, stop_sequences) for _ in cores],
            grow=not rollover,
        )

    def _continue(
        self,
        cores: Sequence[_core.Session],
        max_new_tokens: int,
        params: _core.SamplingParams,
        stops: Sequence[StopRule],
        *,
        grow: bool,
    ) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in cores]
        active = list(range(len(cores)))
        for _ in range(max_new_tokens):
            if not active:
                break
            choices = _core.choose([cores[i] for i in active], [params] * len(active))
            rows = [
                (cores[i], np.array([token], np.int32))
                for i, (token, _) in zip(active, choices, strict=True)
            ]
            _core.run_many(rows, "none", False, True, grow, None)
            for i, (token, _) in zip(active, choices, strict=True):
                results[i].append(token)
            active = [
                i for i, (token, _) in zip(active, choices, strict=True) if not stops[i].hit(token)
            ]
        return results

    def _own(self, session: Session) -> _core.Session:
        if not isinstance(session, Session):
            raise InvalidArgument(
                f"sessions: found {type(session).__name__}, expected an armt.Session"
            )
        if session.engine is not self:
            raise InvalidArgument("sessions: a session belongs to another engine")
        return session._core

    # ------------------------------------------------------------- whole input

    def forward(
        self,
        input_ids: TokenIds,
        attention_mask: Any = None,
        *,
        logits: Logits = "all",
        progress: ProgressLike = None,
    ) -> ForwardOutput:
        """The stateless whole-sequence call with the published semantics.

        ``input_ids`` [batch, tokens] or [tokens]; ``attention_mask`` of the same shape, 1 = real
        token, 0 = padding. Every row starts from an empty memory, is cut as the model's segment
        alignment says, and its last segment is closed; padded rows run and write as in the
        published code. No session is touched.
        """
        ids = _as_batch(input_ids, self._core)
        masks = _as_masks(attention_mask, ids, self._core)
        cuts = segment_lengths(ids.shape[1], self.segment_size, self._checkpoint.segment_alignment)
        cores = [_core.Session(self._core) for _ in ids]
        with reporting(progress, total=ids.size) as report:
            outputs = _core.forward(
                list(zip(cores, ids, strict=True)),
                [cuts] * len(cores),
                masks,
                logits,
                True,
                True,
                report,
            )
        rows = [out for out in outputs if out is not None]
        stacked = np.stack(rows) if rows else None
        return ForwardOutput(stacked, [core.snapshot() for core in cores])

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos_token_id: Sequence[int] | int | None = None,
        pad_token_id: int = 0,
    ) -> npt.NDArray[np.int64]:
        """[batch, prompt + new] int64: each prompt and its continuation, from an empty memory.

        The published generation: the last segment is never closed and grows (the inner loop rolls
        over). ``input_ids`` is [batch, tokens] with an optional ``attention_mask`` (0 = padding,
        on the left), or a list of rows of unequal length; a row's answer is that of the row alone.
        Rows that ended early are filled with ``pad_token_id``.
        """
        prompts = _as_prompts(input_ids, attention_mask, self._core)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        params = sampling.compiled()
        if max_new_tokens < 0:
            raise InvalidArgument(f"max_new_tokens: found {max_new_tokens}, expected 0 or more")
        dialect = self._checkpoint.memory["dialect"]
        alignment = self._checkpoint.segment_alignment
        cuts = [segment_lengths(len(p), self.segment_size, alignment) for p in prompts]
        cores = [_core.Session(self._core) for _ in prompts]
        for row, core in enumerate(cores):
            core.set_seed(check_seed((seed or 0) + row))
        # Published generation knows no window in paper and RMT (docs/mathematics.md).
        windowed = dialect in ("modern", "inner")
        pairs = list(zip(cores, prompts, strict=True))
        _core.forward(pairs, cuts, [], "none", False, windowed, None)
        new = self._continue(
            cores,
            max_new_tokens,
            params,
            [StopRule.of(eos_token_id, ()) for _ in cores],
            grow=dialect != "inner",
        )
        return _join(prompts, new, pad_token_id)


def segment_lengths(tokens: int, size: int, alignment: str) -> list[int]:
    """How ``tokens`` tokens are cut into segments of up to ``size``."""
    if alignment == "left":
        first, rest = 0, tokens
    elif alignment == "right":
        first = tokens % size
        rest = tokens - first
    elif alignment == "center":
        count = -(-tokens // size)
        size = -(-tokens // count)
        first, rest = 0, tokens
    else:
        raise InvalidArgument(
            f"segment_alignment: found {alignment!r}, expected left, right or center"
        )
    lengths = [first] if first else []
    lengths += [size] * (rest // size)
    return lengths + ([rest % size] if rest % size else [])


def _as_batch(input_ids: Any, engine: _core.Engine) -> npt.NDArray[Any]:
    ids = as_array(input_ids, name="input_ids", engine=engine)
    if ids.ndim == 1:
        ids = ids[None, :]
    if ids.ndim != 2:
        raise InvalidArgument(f"input_ids: found shape {ids.shape}, expected [batch, tokens]")
    return ids


def _as_masks(attention_mask: Any, ids: npt.NDArray[Any], engine: _core.Engine) -> list[bytes]:
    """One byte a token for each row; empty if nothing is padded."""
    if attention_mask is None:
        return []
    if on_gpu(attention_mask):
        attention_mask = fetched(attention_mask, "attention_mask", engine)
    mask = np.asarray(attention_mask)
    if mask.ndim == 1:
        mask = mask[None, :]
    if mask.shape != ids.shape:
        raise InvalidArgument(
            f"attention_mask: found shape {mask.shape}, expected that of input_ids, {ids.shape}"
        )
    real = mask != 0
    if real.all():
        return []
    return [row.astype(np.uint8).tobytes() for row in real]


def _as_prompts(
    input_ids: Any, attention_mask: Any, engine: _core.Engine
) -> list[npt.NDArray[Any]]:
    """The rows without their padding."""
    ragged = isinstance(input_ids, (list, tuple)) and len(input_ids) > 0
    ragged = ragged and not isinstance(input_ids[0], (int, np.integer))
    if ragged and attention_mask is None:
        return [
            as_ids(row, name=f"input_ids row {i}", engine=engine) for i, row in enumerate(input_ids)
        ]
    ids = _as_batch(input_ids, engine)
    masks = _as_masks(attention_mask, ids, engine)
    if not masks:
        return list(ids)
    rows = [row[np.frombuffer(mask, np.uint8) != 0] for row, mask in zip(ids, masks, strict=True)]
    for i, row in enumerate(rows):
        if row.size == 0:
            raise InvalidArgument(f"input_ids row {i}: it is padding only")
    return rows


def _join(
    prompts: Sequence[npt.NDArray[Any]], new: Sequence[Sequence[int]], pad: int
) -> npt.NDArray[np.int64]:
    """Prompts padded on the left, continuations on the right."""
    before = max(len(prompt) for prompt in prompts)
    after = max(len(tokens) for tokens in new)
    result = np.full((len(prompts), before + after), pad, np.int64)
    for row, prompt, tokens in zip(result, prompts, new, strict=True):
        row[before - len(prompt) : before] = prompt
        row[before : before + len(tokens)] = tokens
    return result
