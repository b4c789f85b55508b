"""State files of every release still load and go on as they did then."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import armt
import state_format as sf
from armt._core import testing
from make_state_corpus import MODELS, make
from tolerances import assert_close, tolerance

CORPUS = Path(__file__).resolve().parents[1] / "data" / "states"
STATES = sorted(CORPUS.glob("*/*/*.armt-state"))
RELEASES = sorted(CORPUS.iterdir())


@cache
def engine_of(model: Path, isa: str) -> armt.Engine:
    return armt.Engine.from_pretrained(model, device="cpu", threads=2, isa=isa)


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("path", STATES, ids=lambda p: "-".join(p.relative_to(CORPUS).parts))
def test_states_of_all_releases(path: Path, isa: str) -> None:
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    state = armt.State.load(path)
    session = engine_of(path.parent, isa).session(state=state)
    assert session.tokens == state.tokens
    logits = session.feed(expected["follow"], logits="all").logits
    assert logits is not None
    limit = tolerance("state_corpus", "float32")
    assert_close("logits", logits[::4], np.array(expected["logits"]), limit)
    assert list(session.generate(6, write=False)) == expected["greedy"]
    assert list(session.generate(6, temperature=1.2)) == expected["drawn"]


@pytest.mark.parametrize("path", STATES[::5], ids=lambda p: "-".join(p.relative_to(CORPUS).parts))
def test_the_present_format_is_written_as_it_was(path: Path) -> None:
    data = path.read_bytes()
    assert int.from_bytes(data[12:16], "little") == sf.FORMAT
    assert sf.seal(sf.parse(data)) == data
    assert armt.State.from_bytes(data).to_bytes() == data


def test_the_corpus_is_whole() -> None:
    assert [release.name for release in RELEASES] == ["0.1.0"]
    for release in RELEASES:
        assert {p.name for p in release.iterdir()} == {model.name for model in MODELS}
    assert len(STATES) == 6 * len(MODELS)
    size = sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file())
    assert size < 700_000


def test_the_recipe_makes_the_corpus(tmp_path: Path) -> None:
    """The files of this release follow from their recipe, up to the processor's rounding."""
    make(tmp_path)
    for path in sorted((CORPUS / "0.1.0").glob("*/*.armt-state")):
        made = (tmp_path / path.relative_to(CORPUS / "0.1.0")).read_bytes()
        mine, other = sf.parse(made), sf.parse(path.read_bytes())
        assert [(b.type, b.layer, len(b.payload)) for b in mine] == [
            (b.type, b.layer, len(b.payload)) for b in other
        ]
        assert [b.payload for b in mine[:2]] == [b.payload for b in other[:2]], path
