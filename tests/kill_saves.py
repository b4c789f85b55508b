"""Kills a process again and again while it saves states, and looks at what it left.

    python kill_saves.py --kills 1000

Two states of unequal size are saved over one another. After each kill the file must be one of them,
to the last byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import armt


@dataclass
class Report:
    kills: int = 0
    torn: int = 0  # files that were neither state
    first: int = 0  # kills that left the one state
    second: int = 0  # ... the other
    inside: int = 0  # kills in the middle of a save: a temporary file was left


def save_for_ever(path: Path, states: list[armt.State], ready: int) -> None:
    """In the child: saves the states in turn until it is killed."""
    os.write(ready, b".")
    while True:
        for state in states:
            state.save(path)


def kill_one(path: Path, states: list[armt.State], wait: float) -> None:
    heard, ready = os.pipe()
    child = os.fork()  # states that were loaded hold no thread, so a fork is safe
    if child == 0:
        try:
            save_for_ever(path, states, ready)
        finally:
            os._exit(1)
    os.close(ready)
    os.read(heard, 1)
    os.close(heard)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("saving failed before it was killed")


def run(folder: Path, contents: list[bytes], *, kills: int, seed: int) -> Report:
    """Kills `kills` savers of the states in `contents` at random moments of two saves."""
    states = [armt.State.from_bytes(content) for content in contents]
    path = folder / "book.armt-state"
    begin = time.perf_counter()
    for _ in range(4):
        for state in states:
            state.save(path)
    two_saves = (time.perf_counter() - begin) / 4
    rng = random.Random(seed)
    report = Report()
    for _ in range(kills):
        kill_one(path, states, rng.uniform(0, 2 * two_saves))
        found = path.read_bytes()
        report.kills += 1
        report.first += found == contents[0]
        report.second += found == contents[1]
        report.torn += found not in contents
        armt.State.load(path)
        left = [entry for entry in folder.iterdir() if entry != path]
        report.inside += bool(left)
        for entry in left:
            entry.unlink()
    return report


def states_to_save(scratch: Path) -> list[bytes]:
    """Two states of a random model, one and a half and three megabytes."""
    from variants import Variant

    wide = Variant("wide", base_options={"n_embd": 192}, armt_options={"d_mem": 128})
    path = wide.model().save(scratch / "model")
    session = armt.Engine.from_pretrained(path, device="cpu", threads=1).session()
    contents = []
    for count in (7, 20):
        session.feed([1, 2, 3, 4, 5] * count)
        contents.append(session.state.to_bytes())
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as folder:
        contents = states_to_save(Path(scratch))
        report = run(Path(folder), contents, kills=args.kills, seed=args.seed)
    print(json.dumps(asdict(report)))
    raise SystemExit(report.torn > 0)


if __name__ == "__main__":
    main()
