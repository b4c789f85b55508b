"""What a training reads: recipes, endless stories, windows and the processes that make them."""

from __future__ import annotations

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.tasks import stories
from armt.tasks.babi import make_sentences
from armt.tasks.retrieval import Layout

torch = pytest.importorskip("torch", reason='needs the extra "torch"')

from armt.models import resolve  # noqa: E402
from armt.training.babilong import (  # noqa: E402
    LONGEST,
    STRANGERS,
    StoryRow,
    StorySettings,
    Text,
)
from armt.training.feed import Feed  # noqa: E402
from armt.training.pairs import PairRow, PairSettings, PairText  # noqa: E402
from armt.training.recipe import parse_recipe, read_recipe  # noqa: E402
from armt.training.window import Rows, Window  # noqa: E402
from armt.training.worlds import TOLD_OF, GiftTale, WalkTale, new_tale  # noqa: E402

RECIPES = sorted((Path(__file__).parents[2] / "bench" / "recipes").rglob("*.toml"))
RECIPE = """
task = "retrieval"
segment_size = 5
[model]
width = 32
[[stage]]
steps = 10
rows = 4
segments = 3
length = 5
asks = 2
lr = [1e-3, 5e-4]
warm_up = 4
[[stage]]
steps = 5
rows = 4
segments = 3
length = 5
asks = 2
lr = [5e-4, 5e-4]
pairs = 9
"""


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(resolve("demo"), make_sentences(300))


@functools.cache
def _tokenizer() -> Any:
    from armt.text import Tokenizer

    return Tokenizer(resolve("demo"))


# ------------------------------------------------------------------ worlds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["qa1", "qa3", "qa5"])
def test_a_tale_knows_what_the_told_events_decide(kind: str, seed: int) -> None:
    """Against the rules by which the task's own stories are answered from all their events."""
    tale = new_tale(kind, random.Random(seed))
    assert isinstance(tale, (WalkTale, GiftTale))
    told: list[stories.Event] = []
    happen = tale._world.happen

    def noting() -> str:
        sentence = happen()
        told.append(tale._world.events[-1])
        return sentence

    tale._world.happen = noting  # type: ignore[method-assign]
    asked = who = 0
    for _ in range(120):
        tale.tell()
        known: dict[str, Any] = {}
        for task in TOLD_OF[kind]:
            known |= stories.questions(task, told)
        if kind == "qa3":
            last = {event.what: event for event in told if event.kind in ("get", "drop")}
            had = {thing: event.person for thing, event in last.items() if event.kind == "get"}
            known |= {f"Who has the {thing}?": (person, ()) for thing, person in had.items()}
        for _ in range(3):
            found = tale.ask()
            if found is not None and found[0] in known:
                assert known[found[0]][0] == found[1], (found, told)
                asked += 1
                who += found[0].startswith("Who has")
    assert asked > 100
    assert (who > 20) == (kind == "qa3")


def test_a_map_is_answered_by_its_newest_facts() -> None:
    tale = new_tale("qa4", random.Random(1))
    assert tale.ask() is None
    facts: list[tuple[str, str, str]] = []
    for _ in range(200):
        words = tale.tell().rstrip(".").split()
        facts.append((words[1], words[3], words[6]))
        found = tale.ask()
        assert found is not None
        question = found[0].rstrip("?").split()
        if question[2] == "the":
            place, side = question[3], stories.OPPOSITE[question[4]]
        else:
            place, side = question[5], question[2]
        answers = [
            a if (side, place) == (d, b) else b
            for a, d, b in facts
            if (side, place) in ((d, b), (stories.OPPOSITE[d], a))
        ]
        assert answers[-1] == found[1], (found, facts[-5:])


@pytest.mark.parametrize("kind", list(TOLD_OF))
def test_a_tale_goes_on_where_another_stood(kind: str) -> None:
    one = new_tale(kind, random.Random(3))
    for _ in range(50):
        one.tell()
    other = new_tale(kind, random.Random(9))
    other.restore(json.loads(json.dumps(one.to_json())))
    for tale in (one, other):
        tale._rng = random.Random(4)  # type: ignore[attr-defined]
        if hasattr(tale, "_world"):
            tale._world.rng = random.Random(5)
    assert [one.tell() for _ in range(20)] == [other.tell() for _ in range(20)]


# ------------------------------------------------------------------ windows


def story_rows(text: Text, settings: StorySettings, numbers: Any) -> Rows:
    def blank(rows: int) -> Window:
        return Window.empty(rows, 3, 128, 6, LONGEST)

    return Rows(functools.partial(StoryRow, settings, text, 7), numbers, blank)


def test_windows_are_the_text_that_the_questions_are_about(text: Text) -> None:
    settings = StorySettings(worlds={"qa1": 1.0}, fresh=(0.2,), quiet=0.2, density=(4.0, 60.0))
    rows = story_rows(text, settings, range(6))
    stream: list[str] = [""] * 6
    asked = {"before": 0, "inside": 0}
    for _ in range(8):
        window = rows.next()
        for row in range(6):
            if window.fresh[row]:
                stream[row] = ""
            for segment in range(3):
                ids = window.tokens[row, segment].tolist()
                facts = [p for p in stories.PEOPLE if f" {p} " in _tokenizer().decode(ids)]
                if window.quiet[row, segment]:
                    assert not facts
                for slot in range(6):
                    answer = int(window.answers[row, segment, slot])
                    if answer < 0 or window.kinds[row, segment, slot]:
                        continue
                    seen = int(window.seen[row, segment, slot])
                    assert seen <= 128 - LONGEST
                    asked["inside" if seen else "before"] += 1
                    end = int(window.last[row, segment, slot]) + 1
                    ids_asked = window.asks[row, segment, slot, :end].tolist()
                    person = _tokenizer().decode(ids_asked).split()[-1].rstrip("?")
                    known = stream[row] + _tokenizer().decode(ids[:seen])
                    last = known.rindex(f" {person} ")
                    told = known[last:].split(".")[0].split()
                    assert told[-1] == _tokenizer().decode([answer]).strip()
                stream[row] += _tokenizer().decode(ids)
    assert min(asked.values()) > 50


def test_windows_of_nothing_but_facts_are_asked_about(text: Text) -> None:
    settings = StorySettings(worlds={"qa1": 1.0}, quiet=0.0, density=(73.0, 73.0))
    rows = story_rows(text, settings, range(8))
    windows = [rows.next() for _ in range(4)]
    asked = np.concatenate([window.answers >= 0 for window in windows])
    before = np.concatenate([window.seen < 10 for window in windows])
    assert asked.mean() > 0.95
    assert (asked & before).mean() > 0.2


def test_decoys_look_like_facts_and_change_no_answer(text: Text) -> None:
    settings = StorySettings(worlds={"qa1": 1.0}, quiet=1.0, decoys=0.5, fresh=(0.0,))
    rows = story_rows(text, settings, range(4))
    read = ""
    for _ in range(6):
        window = rows.next()
        assert window.quiet.all()  # nothing worth remembering
        assert (window.answers < 0).all()  # nobody was anywhere
        read += _tokenizer().decode(window.tokens.ravel().tolist())
    names = [name for name in (*stories.PEOPLE, *stories.PLACES) if f" {name}" in read]
    strangers = [who for who in STRANGERS if f" {who} " in read]
    assert len(names) > 6 and len(strangers) > 6
    for person in stories.PEOPLE:
        assert not re.search(rf"{person} (went|moved|travelled|journeyed) (back )?to the", read)


def test_people_of_the_book_bear_names_from_the_stories() -> None:
    said = [
        f"So {who} looked at the sea for {n} hours." for who in ("Ahab", "Pip") for n in "23456"
    ]
    book = Text(resolve("babilong"), [*said, "It was cold and nobody looked."])
    rng = random.Random(1)
    told = {_tokenizer().decode(book.namesake(rng)).strip() for _ in range(100)}
    assert len({sentence.split()[1] for sentence in told}) > 4
    for sentence in told:
        _, who, *rest = sentence.split()
        assert who in stories.PEOPLE + stories.GIVERS and " ".join(rest).startswith("looked at")
    plain = Text(resolve("babilong"), ["It was cold.", "Nobody looked."])
    assert plain.namesake(rng)


def test_the_answers_ends_are_asked_for_too(text: Text) -> None:
    rows = story_rows(text, StorySettings(quiet=0.0), range(8))
    ends = 0
    for _ in range(6):
        window = rows.next()
        for at in zip(*np.nonzero(window.kinds == len(text.kinds) - 1), strict=True):
            assert window.answers[at] == text.end
            assert window.asks[at][window.last[at]] in text.words.values()
            ends += 1
    assert ends > 5


def test_pairs_are_asked_for_their_newest_value() -> None:
    layout = Layout(key_symbols=1)
    settings = PairSettings(pairs=9, pool=4, fresh=(0.2,), hold=(0.1, 5))
    rows = Rows(
        functools.partial(PairRow, settings, PairText(layout), 1),
        range(10),
        lambda count: Window.empty(count, 6, 4, 3, 2),
    )
    known: list[dict[int, int]] = [{} for _ in range(10)]
    again = asked = 0
    for _ in range(10):
        window = rows.next()
        for row in range(10):
            if window.fresh[row]:
                known[row] = {}
            for segment in range(6):
                for slot in range(3):
                    value = int(window.answers[row, segment, slot])
                    if value >= 0:
                        key, gen = window.asks[row, segment, slot].tolist()
                        assert gen == layout.gen and known[row][key] == value
                        asked += 1
                key, sep, value, eos = window.tokens[row, segment].tolist()
                assert window.quiet[row, segment] == (key == layout.filler)
                if key != layout.filler:
                    assert (sep, eos) == (layout.sep, layout.eos)
                    again += key in known[row]
                    known[row][key] = value
    assert again > 50 and asked > 500


@pytest.mark.parametrize("kind", ["stories", "pairs"])
def test_rows_are_the_same_in_any_number_of_processes_and_can_go_on(text: Text, kind: str) -> None:
    settings = StorySettings(fresh=(0.3, 0.0), hold=(0.1, 5))
    pairs = PairSettings(fresh=(0.3, 0.0), hold=(0.1, 5))

    def make(numbers: Any) -> Rows:
        if kind == "stories":
            return story_rows(text, settings, numbers)
        row = functools.partial(PairRow, pairs, PairText(Layout()), 1)
        return Rows(row, numbers, lambda count: Window.empty(count, 3, 5, 2, 3))

    here, there = Feed(make, 5), Feed(make, 5, workers=2, keep=lambda n: n == 3)
    try:
        state = ""
        for number in range(6):
            one, other = here.next(), there.next()
            for name, values in one.arrays().items():
                np.testing.assert_array_equal(values, other.arrays()[name], err_msg=name)
            if number == 2:
                state = there.state()
                assert json.loads(state) == json.loads(here.state())
        later = Feed(make, 5, workers=3, state=state)
        try:
            for _ in range(3):
                again = later.next()
            np.testing.assert_array_equal(again.tokens, one.tokens)
            np.testing.assert_array_equal(again.asks, one.asks)
        finally:
            later.close()
    finally:
        there.close()


def test_what_breaks_in_a_process_is_raised_here() -> None:
    def make(numbers: Any) -> Rows:
        raise armt.InvalidArgument("no rows today")

    feed = Feed(make, 4, workers=2)
    try:
        with pytest.raises(armt.InvalidArgument, match="no rows today"):
            feed.next()
    finally:
        feed.close()


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_recipes(path: Path) -> None:
    recipe, text = read_recipe(path)
    assert recipe.steps > 0 and text.startswith("#")


def test_a_recipe_tells_stages_and_rates() -> None:
    recipe = parse_recipe(RECIPE)
    assert recipe.steps == 15 and recipe.layout.segment == 5
    assert [recipe.at(step) for step in (0, 9, 10, 14, 15)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 4),
        (1, 5),
    ]
    first = recipe.stages[0]
    assert first.rate(0) == 0.25e-3 and first.rate(9) == pytest.approx(5e-4)
    assert recipe.stages[1].task == PairSettings(pairs=9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('task = "retrieval"', "", "task: found None"),
        ("[model]", "[modell]", "found modell, expected some of"),
        ("pairs = 9", "pears = 9", "stage 2: found pears"),
        ("steps = 10", "steps = 0", "stage 1: steps: found 0"),
        ("steps = 10", "", "stage 1: found no steps"),
        ("steps = 10", 'steps = "ten"', "steps: found 'ten', expected int"),
        ("lr = [1e-3, 5e-4]", "lr = [1e-3]", "lr: found 1 values"),
        ("lr = [1e-3, 5e-4]", "lr = [-1.0, 1.0]", "found -1.0, expected 0 or more"),
        ("length = 5", "length = 6", "length: found 6, expected at most"),
        ("segment_size = 5", "segment_size = 5 5", "expected TOML"),
    ],
)
def test_recipes_that_cannot_be(old: str, new: str, message: str) -> None:
    with pytest.raises(armt.InvalidArgument, match=message):
        parse_recipe(RECIPE.replace(old, new, 1))


def test_stories_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(armt.InvalidArgument, match="worlds"):
        StorySettings(worlds={"qa9": 1.0})
    with pytest.raises(armt.InvalidArgument, match="cannot be read"):
        read_recipe(Path("no such recipe"))
