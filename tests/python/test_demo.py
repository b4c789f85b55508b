"""The demo: its material, its stories, and an exam that can be failed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import armt
from armt.demo import exam, grammar
from armt.demo.exam import Result, examine, peak_memory
from armt.demo.story import (
    Story,
    answer_text,
    check_material,
    material,
    people,
    question,
)
from armt.models import DEFAULT, resolve


class Stopwatch:
    """A clock without a bar."""

    seconds = 1.0

    def __init__(self) -> None:
        self.seen: list[int] = []

    def update(self, done: float, tokens: int) -> None:
        self.seen.append(tokens)

    def resume(self) -> None:
        pass

    def note(self, resident: int, state: int) -> None:
        assert resident > 1 << 20 and state > 0


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained(resolve(DEFAULT), device="cpu")


def told(story: Story, *sizes: int) -> list[int]:
    """All ids of a story, read in pieces of the given sizes in turn."""
    ids: list[int] = []
    while len(ids) < story.tokens:
        ids += story.read(sizes[len(ids) % len(sizes)]).tolist()
    return ids


def test_material_is_what_the_tokenizer_makes_of_the_grammar() -> None:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')
    from armt.demo.build_material import build

    assert json.loads(json.dumps(build())) == material()


def test_material_covers_every_fact() -> None:
    facts = {(f["person"], f["place"], f["text"]) for f in material()["facts"]}
    assert len(facts) == len(grammar.PEOPLE) * len(grammar.VERBS) * len(grammar.PLACES)
    assert set(material()["answers"]) == set(grammar.PLACES)
    assert people() == grammar.PEOPLE


def test_the_haystack_says_nothing_about_the_people() -> None:
    phrases = [text for texts in material()["phrases"].values() for text, _ in texts]
    assert not [p for p in phrases if any(person in p for person in people())]


@pytest.mark.parametrize("tokens", [1, 40, 1000, 5000])
def test_a_story_does_not_depend_on_how_it_is_read(tokens: int) -> None:
    whole, pieces = Story(tokens, 5, seed=3), Story(tokens, 5, seed=3)
    ids = told(whole, tokens)
    assert len(ids) == tokens
    assert ids == told(pieces, 1, 7, 512)
    assert whole.facts == pieces.facts
    assert tokens < 1000 or ids != told(Story(tokens, 5, seed=4), tokens)


def test_facts_stand_where_the_story_says() -> None:
    story = Story(20_000, 10, seed=1)
    ids = told(story, 512)
    spelled = {fact["text"].strip(): fact["ids"] for fact in material()["facts"]}
    assert len(story.facts) == 14
    assert {f.person for f in story.facts if f.position < 20_000 // 6 + 200} == set(people())
    for fact in story.facts:
        assert ids[fact.position : fact.end] == spelled[fact.text]
        assert fact.place in fact.text and fact.person in fact.text
    for person in people():
        places = [f.place for f in story.facts if f.person == person]
        assert all(a != b for a, b in itertools.pairwise(places))


def test_a_fact_counts_when_its_sentence_has_been_read() -> None:
    story = Story(20_000, 0, seed=2)
    told(story, 20_000)
    fact = story.facts[0]
    again = Story(20_000, 0, seed=2)
    again.read(fact.end - 1)
    assert again.last_fact(fact.person) is None
    again.read(1)
    assert again.last_fact(fact.person) == fact


def test_questions_and_answers_have_words() -> None:
    text, ids = question("Mary")
    assert text == "Where is Mary?" and ids.ndim == 1
    assert {answer_text(i) for i in material()["answers"].values()} == set(grammar.PLACES)
    assert answer_text(0) == "(token 0)"


def run_exam(engine: armt.Engine, *, tokens: int = 12_000) -> Result:
    return examine(engine, tokens=tokens, questions=10, moves=6, seed=5, clock=Stopwatch())


def test_the_demo_remembers_in_constant_memory(engine: armt.Engine) -> None:
    clock = Stopwatch()
    result = examine(engine, tokens=30_000, questions=10, moves=6, seed=5, clock=clock)
    assert result.passed and len(result.answers) == 10
    assert result.saved.same and result.saved.at == 15_000 < result.saved.file_bytes
    assert result.tokens == 30_000 == clock.seen[-1]
    assert clock.seen == sorted(clock.seen)
    assert result.segments == -(-30_000 // engine.segment_size)
    assert result.memory_bytes[0] == result.memory_bytes[1] > 0
    assert abs(result.state_bytes[0] - result.state_bytes[1]) <= 8 * engine.segment_size
    assert max(a.tokens_ago for a in result.answers) > 10 * engine.segment_size
    assert {a.asked_at for a in result.answers} == {10_000, 20_000, 30_000}


def test_a_session_goes_through_a_file(engine: armt.Engine) -> None:
    story = Story(3000, 2, seed=6)
    straight, saved = engine.session(), engine.session()
    first, second = story.read(1300), story.read(1700)
    straight.feed(first)
    saved.feed(first)
    later, found = exam.through_a_file(saved)
    assert saved.closed and found.same and found.at == 1300
    straight.feed(second)
    later.feed(second)
    assert later.state.to_bytes() == straight.state.to_bytes()
    np.testing.assert_array_equal(later.logits, straight.logits)


def test_moves_are_counted() -> None:
    story = Story(20_000, 10, seed=1)
    told(story, 512)
    for person in people():
        fact = story.last_fact(person)
        assert fact is not None
        assert story.told_before(fact) == sum(f.person == person for f in story.facts) - 1


def test_material_belongs_to_the_tokenizer(tmp_path: Path) -> None:
    check_material(resolve(DEFAULT))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(armt.CheckpointError, match="build_material"):
        check_material(tmp_path)


def test_questions_leave_no_trace(engine: armt.Engine) -> None:
    story = Story(3000, 2, seed=6)
    asked, quiet = engine.session(), engine.session()
    for ids in story.chunks(1000):
        asked.feed(ids)
        quiet.feed(ids)
        exam.ask_all(asked, story, ids)
    np.testing.assert_array_equal(asked.logits, quiet.logits)
    assert asked.state.to_bytes() == quiet.state.to_bytes()


@pytest.mark.parametrize("position", range(500, 513))
def test_a_question_is_not_torn_in_two(engine: armt.Engine, position: int) -> None:
    fact = next(f for f in material()["facts"] if f["text"] == " Mary moved to the office.")
    session = engine.session()
    session.feed(Story(position - len(fact["ids"]), 0, seed=1).read(position))
    session.feed(fact["ids"])
    assert session.tokens == position
    assert exam.ask(session, "Mary") == "office"


def test_without_memory_the_exam_is_failed(
    engine: armt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask: Callable[[armt.Session, str], str] = exam.ask

    def forgetful(session: armt.Session, person: str) -> str:
        empty = engine.session()
        empty.feed(Story(100, 0).read(40))
        return ask(empty, person)

    passed = run_exam(engine)
    assert passed.passed and passed.right_without < passed.needed
    monkeypatch.setattr(exam, "ask", forgetful)
    assert not run_exam(engine).passed


def test_the_result_for_machines(engine: armt.Engine) -> None:
    assert peak_memory() > 0
    result = run_exam(engine)
    line = json.loads(json.dumps(result.to_json()))
    assert line["right"] == sum(a["right"] for a in line["answers"])
    assert line["asked"] == 10 and line["passed"]
