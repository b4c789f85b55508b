"""Run as a program: continues saved states in a process of its own and says where they differ.

    python state_child.py MANIFEST

MANIFEST is a JSON list of Case fields; one line is printed for each case that goes wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import armt


@dataclass(frozen=True)
class Case:
    name: str
    model: str  # checkpoint folder
    state: str  # saved state
    tokens: list[int]  # to feed
    draws: int  # tokens to generate after that, going on in the state's sequence
    logits: str  # .npy [tokens, vocab] float32: what feeding must give
    drawn: list[int]  # what generating must give
    after: str  # state file: what must be left in the end


def continue_session(
    session: armt.Session, tokens: Sequence[int], draws: int
) -> tuple[bytes, list[int], bytes]:
    """Feeds and generates; logits, new tokens and the state's bytes."""
    logits = session.feed(tokens, logits="all").logits
    assert logits is not None
    drawn = list(session.generate(draws, temperature=1.3, top_p=0.98))
    return logits.tobytes(), drawn, session.state.to_bytes()


def faults_of(case: Case, engine: armt.Engine) -> list[str]:
    session = engine.session(state=armt.State.load(case.state))
    logits, drawn, after = continue_session(session, case.tokens, case.draws)
    faults = []
    if logits != np.load(case.logits).tobytes():
        faults.append("logits")
    if drawn != case.drawn:
        faults.append("drawn tokens")
    if after != Path(case.after).read_bytes():
        faults.append("state")
    return faults


def write_manifest(path: Path, cases: Sequence[Case]) -> None:
    path.write_text(json.dumps([asdict(case) for case in cases]))


def main() -> None:
    cases = [Case(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    engines: dict[str, armt.Engine] = {}
    for case in cases:
        if case.model not in engines:
            # Another schedule and another number of threads than where the states were made.
            engines[case.model] = armt.Engine.from_pretrained(
                case.model, device="cpu", threads=1, schedule="diagonal"
            )
        faults = faults_of(case, engines[case.model])
        if faults:
            print(f"{case.name}: other {', '.join(faults)}")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
