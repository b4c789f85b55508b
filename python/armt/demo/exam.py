"""Reads a story through the engine and asks about it on the way."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from armt._core import State
from armt.demo.story import Fact, Ids, Story, answer_text, people, question
from armt.engine import Engine
from armt.session import Session

SEGMENTS_A_CALL = 32
SEGMENTS_A_CALL_GPU = 256


class Clock(Protocol):
    """Follows the reading; questions do not count as reading."""

    @property
    def seconds(self) -> float:
        """Time spent reading."""

    def update(self, done: float, tokens: int) -> None:
        """So much has been read."""

    def resume(self) -> None:
        """Reading goes on."""

    def note(self, resident: int, state: int) -> None:
        """Bytes of the process now, and of the session's state."""


@dataclass(frozen=True)
class Answer:
    """One question, what the model said and what the story says."""

    question: str
    answer: str
    expected: str
    asked_at: int
    """Tokens read before the question."""
    fact: Fact
    overwritten: int = 0
    """Older facts about the same person, which are no longer true."""
    without: str = ""
    """What the same model says that has read nothing but the last segment's worth of tokens."""

    @property
    def right(self) -> bool:
        """Whether the model knew."""
        return self.answer == self.expected

    @property
    def tokens_ago(self) -> int:
        """Tokens read since the fact began."""
        return self.asked_at - self.fact.position


@dataclass(frozen=True)
class Saved:
    """The memory was written to a file, thrown away and read again."""

    at: int
    """Tokens read before."""
    file_bytes: int
    same: bool
    """Whether what was read is bit for bit what was written, and goes on with the same logits."""


@dataclass(frozen=True)
class Result:
    """Everything that the demo found out."""

    device: str
    description: str
    dtype: str
    tokens: int
    segments: int
    facts: int
    seed: int
    seconds: float
    first_tokens: int
    """Tokens after which the first of each two sizes was taken; the second was at the end."""
    memory_bytes: tuple[int, int]
    """Size of what the session remembers: A and z of all layers."""
    state_bytes: tuple[int, int]
    """Size of the whole state as saved to a file, the ids of the last segments included."""
    peak_bytes: tuple[int, int]
    """Largest resident memory of the process so far."""
    saved: Saved
    answers: list[Answer]

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(answer.right for answer in self.answers)

    @property
    def right_without(self) -> int:
        """Number of right answers without the memory."""
        return sum(answer.without == answer.expected for answer in self.answers)

    @property
    def needed(self) -> int:
        """Three in four."""
        return -(-3 * len(self.answers) // 4)

    @property
    def passed(self) -> bool:
        """Whether enough answers are right and the memory came back from its file unchanged."""
        return self.right >= self.needed and self.saved.same

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        answers = [asdict(a) | {"right": a.right, "tokens_ago": a.tokens_ago} for a in self.answers]
        return asdict(self) | {
            "answers": answers,
            "tokens_per_second": self.tokens / self.seconds,
            "right": self.right,
            "right_without_memory": self.right_without,
            "asked": len(self.answers),
            "needed": self.needed,
            "passed": self.passed,
        }


def examine(
    engine: Engine, *, tokens: int, questions: int, moves: int, seed: int, clock: Clock
) -> Result:
    """Reads ``tokens`` tokens; asks ``questions`` questions, as many people at a time as there are,
    the last ones at the end. In the middle the session goes through a file."""
    story = Story(tokens, moves, seed)
    session = engine.session()
    rounds = -(-questions // len(people()))
    ends = [tokens * number // rounds for number in range(1, rounds + 1)]
    answers: list[Answer] = []
    saved: Saved | None = None
    first = min(SEGMENTS_A_CALL * engine.segment_size, ends[0], tokens // 2)
    tail = _read(session, story, first, clock, np.zeros(0, np.int32))
    sizes = [_sizes(session, engine)]
    for end in ends:
        if saved is None and end >= tokens // 2:
            tail = _read(session, story, tokens // 2, clock, tail)
            session, saved = through_a_file(session)
        tail = _read(session, story, end, clock, tail)
        answers += ask_all(session, story, tail)[: questions - len(answers)]
    assert saved is not None  # the last round ends behind the middle
    sizes.append(_sizes(session, engine))
    return Result(
        device=engine.device,
        description=engine.description,
        dtype=engine.dtype,
        tokens=session.tokens,
        segments=session.segments + (session.open_tokens > 0),
        facts=len(story.facts),
        seed=seed,
        seconds=clock.seconds,
        first_tokens=sizes[0][0],
        memory_bytes=(sizes[0][1], sizes[1][1]),
        state_bytes=(sizes[0][2], sizes[1][2]),
        peak_bytes=(sizes[0][3], sizes[1][3]),
        saved=saved,
        answers=answers,
    )


def through_a_file(session: Session) -> tuple[Session, Saved]:
    """Saves a session's state, closes the session, and returns a new one from the file."""
    engine, at = session.engine, session.tokens
    before, logits = session.state.to_bytes(), session.logits
    with tempfile.TemporaryDirectory(prefix="armt-demo-") as folder:
        path = Path(folder) / "memory.armt-state"
        session.state.save(path)
        session.close()
        later = engine.session(state=State.load(path))
        same = later.state.to_bytes() == before and np.array_equal(later.logits, logits)
        return later, Saved(at, path.stat().st_size, bool(same))


def _read(session: Session, story: Story, end: int, clock: Clock, tail: Ids) -> Ids:
    """Reads on until the session has read ``end`` tokens; the last segment's worth of tokens."""
    engine = session.engine
    size = engine.segment_size
    segments = SEGMENTS_A_CALL_GPU if engine.device.startswith("cuda") else SEGMENTS_A_CALL
    clock.resume()
    while (before := session.tokens) < end:
        ids = story.read(min(segments * size, end - before))

        def report(done: int, *, before: int = before) -> None:
            clock.update(before + done, before + done)

        session.feed(ids, progress=report)
        clock.note(resident_memory(), engine.stats()["state_bytes"])
        tail = np.concatenate([tail, ids])[-size:]
    clock.update(end, end)
    return tail


def ask_all(session: Session, story: Story, tail: Ids) -> list[Answer]:
    """Where is everybody of whom the story has told? The session is left as it is.

    The same is asked of a session that has read ``tail`` only: the model without its memory.
    """
    told = [(person, story.last_fact(person)) for person in people()]
    with session.engine.session() as forgetful:
        forgetful.feed(tail)
        return [
            Answer(
                question(person)[0],
                ask(session, person),
                fact.place,
                session.tokens,
                fact,
                story.told_before(fact),
                ask(forgetful, person),
            )
            for person, fact in told
            if fact is not None
        ]


def ask(session: Session, person: str) -> str:
    """The model's answer, one token, from a fork."""
    _, ids = question(person)
    with session.fork() as branch:
        if branch.open_tokens + len(ids) > session.engine.segment_size:
            branch.close_segment()  # a question is not torn in two
        logits = branch.feed(ids, logits="last").logits
    assert logits is not None
    return answer_text(int(logits.argmax()))


def _sizes(session: Session, engine: Engine) -> tuple[int, int, int, int]:
    """Tokens read, bytes of the memory, of the saved state, and peak bytes of the process."""
    with session.fork() as branch:
        branch.close_segment()
        state = branch.state
    parts = [a for i in range(engine.checkpoint.decoder["n_layers"]) for a in state.memory(i)]
    memory = sum(a.nbytes for a in parts if a is not None)
    return session.tokens, memory, len(state.to_bytes()), peak_memory()


def resident_memory() -> int:
    """Resident memory of this process in bytes; its largest where the system tells only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return peak_memory()


def peak_memory() -> int:
    """Largest resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
