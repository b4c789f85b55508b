"""Sessions and states on the CPU: what forking, saving, restoring and holding many of them costs.

    python bench/sessions.py --out bench/results/cpu_sessions.json

The model is the package's own small trained one. Every figure stands behind a comparison of
answers, bit for bit; a difference ends the program with an error and no figures are written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import armt
import harness

MODEL = Path(armt.__file__).resolve().parent / "models" / "babilong"
Ids = npt.NDArray[np.int32]


class WrongAnswerError(Exception):
    """Two ways to the same answer differ."""


def same(what: str, found: armt.StepOutput, expected: armt.StepOutput, last: int) -> None:
    """The last rows of two outputs, bit for bit."""
    assert found.logits is not None and expected.logits is not None
    if found.logits[-last:].tobytes() != expected.logits[-last:].tobytes():
        raise WrongAnswerError(what)


def timed(call: Callable[[], Any], *, samples: int, calls: int = 1) -> dict[str, Any]:
    """Seconds of one call; each sample is the mean of some calls."""
    call()
    seconds = []
    for _ in range(samples):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begin) / calls)
    return harness.median_spread(seconds)


class Bench:
    def __init__(self, engine: armt.Engine, *, scale: float) -> None:
        self.engine = engine
        self.scale = scale
        self.rng = np.random.default_rng(0)

    def ids(self, count: int) -> Ids:
        return self.rng.integers(0, self.engine.vocab_size, count).astype(np.int32)

    def times(self, count: int) -> int:
        return max(1, int(count * self.scale))

    def reader(self, count: int) -> armt.Session:
        session = self.engine.session()
        session.feed(self.ids(count))
        return session

    # ------------------------------------------------------------ one session

    def fork(self) -> dict[str, Any]:
        """A fork, and a fork with the first token read on it, in the middle of a segment."""
        size = self.engine.segment_size
        session = self.reader(10 * size + size // 2)
        token = self.ids(1)
        same(
            "a fork and its origin",
            session.fork().feed(token, logits="last"),
            session.feed(token, logits="last", write=False),
            1,
        )
        branch = session.fork()
        return {
            "fork_seconds": timed(session.fork, samples=50, calls=200),
            "checkpoint_seconds": timed(session.checkpoint, samples=50, calls=200),
            "fork_and_one_token_seconds": timed(
                lambda: session.fork().feed(token), samples=50, calls=20
            ),
            "one_token_seconds": timed(lambda: branch.feed(token), samples=50, calls=4),
            "target_fork_seconds": 100e-6,
        }

    def restore(self) -> dict[str, Any]:
        """Save and load after a long text, against reading the text again."""
        with tempfile.TemporaryDirectory() as folder:
            return self.restore_in(Path(folder))

    def restore_in(self, folder: Path) -> dict[str, Any]:
        count = self.times(100_000)
        text, question = self.ids(count), self.ids(20)
        session = self.engine.session()
        session.feed(text)
        state = session.state
        path = folder / "book.armt-state"
        state.save(path)
        data = state.to_bytes()

        def restored() -> armt.Session:
            return self.engine.session(state=armt.State.load(path))

        def read_again() -> None:
            self.engine.session().feed(text)

        expected = session.feed(question, logits="all", write=False)
        same("restored", restored().feed(question, logits="all"), expected, len(question))
        both = harness.interleave({"restore": restored, "read": read_again}, 7)
        part = [a / b for a, b in zip(both["restore"], both["read"], strict=True)]
        return {
            "text_tokens": count,
            "file_bytes": len(data),
            "to_bytes_seconds": timed(state.to_bytes, samples=30, calls=5),
            "from_bytes_seconds": timed(lambda: armt.State.from_bytes(data), samples=30, calls=5),
            "save_seconds": timed(lambda: state.save(path), samples=30),
            "load_seconds": timed(lambda: armt.State.load(path), samples=30, calls=5),
            "restore_seconds": harness.median_spread(both["restore"]),
            "read_again_seconds": harness.median_spread(both["read"]),
            "restore_part_of_reading": harness.median_spread(part),
            "target_part": 0.01,
        }

    def steps(self) -> dict[str, Any]:
        """One segment a step over a long stream, and one generated token at a time."""
        size = self.engine.segment_size
        count = self.times(4000)
        segments = self.ids(64 * size).reshape(64, size)
        session = self.engine.session()
        session.step(segments[0])
        seconds = np.empty(count)
        for i in range(count):
            segment = segments[i % 64]
            begin = time.perf_counter()
            session.step(segment)
            seconds[i] = time.perf_counter() - begin
        tenth = max(1, count // 10)
        return {
            "segment_tokens": size,
            "steps": count,
            "stream_tokens": session.tokens,
            "step": percentiles(seconds),
            "first_tenth_p10": float(np.percentile(seconds[:tenth], 10)),
            "last_tenth_p10": float(np.percentile(seconds[-tenth:], 10)),
            "generated_token": percentiles(self.generated(self.times(4000))),
        }

    def generated(self, count: int) -> npt.NDArray[np.float64]:
        session = self.reader(10)
        seconds = np.empty(count)
        tokens = session.generate(count, temperature=1.0, seed=1)
        for i in range(count):
            begin = time.perf_counter()
            next(tokens)
            seconds[i] = time.perf_counter() - begin
        return seconds

    # ---------------------------------------------------------- many sessions

    def questions(self) -> dict[str, Any]:
        """Forks of one document, each with a question, against reading the document again."""
        size, count = self.engine.segment_size, self.times(1000)
        document = self.ids(3 * size + size // 3)
        reader = self.engine.session()
        reader.feed(document)
        held = self.engine.stats()["state_bytes"]
        resident = harness.resident_bytes()
        questions = [self.ids(int(n)) for n in self.rng.integers(1, 40, count)]
        branches = [reader.fork() for _ in questions]
        idle = self.engine.stats()["state_bytes"] - held
        begin = time.perf_counter()
        answers = [
            branch.feed(question, logits="last")
            for branch, question in zip(branches, questions, strict=True)
        ]
        forked = time.perf_counter() - begin
        grown = self.engine.stats()["state_bytes"] - held
        resident = harness.resident_bytes() - resident
        begin = time.perf_counter()
        for question, found in zip(questions, answers, strict=True):
            again = self.engine.session()
            expected = again.feed(np.concatenate([document, question]), logits="last")
            same("a fork and reading again", found, expected, 1)
        return {
            "forks": count,
            "document_tokens": len(document),
            "different_answers": 0,
            "bytes_of_one_session": held,
            "bytes_grown_by_forking": idle,
            "bytes_grown_a_question": grown / count,
            "resident_grown_a_question": resident / count,
            "seconds_a_question": forked / count,
            "seconds_a_question_reading_again": (time.perf_counter() - begin) / count,
        }

    def hold_empty(self) -> dict[str, Any]:
        """Resident memory of living sessions that have read nothing."""
        return self.hold(self.times(100_000), 0)

    def hold_closed(self) -> dict[str, Any]:
        """... with a memory and no open segment."""
        return self.hold(self.times(2_000), self.engine.segment_size)

    def hold_open(self) -> dict[str, Any]:
        """... with a memory and half a segment open."""
        return self.hold(self.times(2_000), self.engine.segment_size * 3 // 2)

    def hold(self, count: int, tokens: int) -> dict[str, Any]:
        text = self.ids(tokens)

        def new_session() -> armt.Session:
            session = self.engine.session()
            if tokens:
                session.feed(text)
            if tokens == self.engine.segment_size:
                session.close_segment()
            return session

        new_session()
        before = harness.resident_bytes()
        begin = time.perf_counter()
        living = [new_session() for _ in range(count)]
        seconds = time.perf_counter() - begin
        each = (harness.resident_bytes() - before) / count
        return {
            "sessions": count,
            "tokens": tokens,
            "state_bytes": living[0].state.nbytes,
            "resident_bytes_each": each,
            "sessions_per_gb": int(1e9 / each),
            "seconds_each": seconds / count,
        }

    def come_and_go(self) -> dict[str, Any]:
        """Sessions made, used and dropped, 500 at a time; resident memory while 500 are alive."""
        batches, alive = self.times(200), 500
        text = self.ids(4)
        resident = []
        begin = time.perf_counter()
        for _ in range(batches):
            living = [self.engine.session() for _ in range(alive)]
            for session in living:
                session.step(text, logits="none")
            resident.append(harness.resident_bytes())
            del living, session
        seconds = time.perf_counter() - begin
        early = resident[batches // 10]
        return {
            "sessions": batches * alive,
            "resident_early": early,
            "resident_late": resident[-1],
            "growth": max(resident[batches // 10 :]) / early - 1,
            "target_growth": 0.01,
            "seconds_each": seconds / (batches * alive),
        }

    def threads(self) -> dict[str, Any]:
        """8 threads of 1,000 steps on sessions of their own; every answer is compared."""
        steps, workers = self.times(1000), 8
        segments = self.ids(50 * 64).reshape(50, 64)
        alone = self.engine.session()
        begin = time.perf_counter()
        expected = [alone.step(segment) for segment in segments]
        one = (time.perf_counter() - begin) / len(segments)
        wrong = [0] * workers

        def work(index: int) -> None:
            session = self.engine.session()
            for i in range(steps):
                if i % len(segments) == 0:
                    session = self.engine.session()
                found = session.step(segments[i % len(segments)])
                try:
                    same("threads", found, expected[i % len(segments)], 1)
                except WrongAnswerError:
                    wrong[index] += 1

        pool = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        begin = time.perf_counter()
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        seconds = time.perf_counter() - begin
        if any(wrong):
            raise WrongAnswerError(f"{sum(wrong)} of {workers * steps} steps in threads")
        return {
            "threads": workers,
            "steps_each": steps,
            "wrong": 0,
            "segment_tokens": 64,
            "tokens_per_second": workers * steps * 64 / seconds,
            "tokens_per_second_of_one_thread": 64 / one,
        }


def percentiles(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    names = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9, "greatest": 100}
    return {name: float(np.percentile(seconds, part)) for name, part in names.items()}


def flat(part: dict[str, Any]) -> dict[str, Any]:
    """For people: medians only, in one level."""
    row: dict[str, Any] = {}
    for name, value in part.items():
        if isinstance(value, dict) and "median" in value:
            row[name] = value["median"]
        elif isinstance(value, dict):
            row |= {f"{name}.{inner}": figure for inner, figure in value.items()}
        else:
            row[name] = value
    return row


PARTS = (
    "fork",
    "restore",
    "steps",
    "questions",
    "hold_empty",
    "hold_closed",
    "hold_open",
    "come_and_go",
    "threads",
)


def run_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    engine = armt.Engine.from_pretrained(
        args.model, device="cpu", dtype=args.dtype, threads=args.threads
    )
    part = getattr(Bench(engine, scale=args.scale), name)()
    return {"engine": engine.description, "dtype": engine.dtype} | part


def run_apart(name: str) -> dict[str, Any]:
    """In a process of its own, so that no part finds memory that another one gave back."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL), help="checkpoint folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts, to try it out")
    parser.add_argument("--part", choices=PARTS, help="only this one, as JSON to stdout")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(run_part(args.part, args)))
        return
    results: dict[str, Any] = {"model": Path(args.model).name, "scale": args.scale}
    for name in PARTS:
        results[name] = run_apart(name)
        harness.show(name, flat(results[name]))
    if args.out is not None:
        print(harness.write(args.out, "cpu_sessions", results))


if __name__ == "__main__":
    main()
