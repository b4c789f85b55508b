"""Endless stories of the five bAbI kinds, for training: a world goes on, and what was told of it
decides the questions at any time. The sentences are those of :mod:`armt.tasks.stories`."""

from __future__ import annotations

import random
from typing import Any, Protocol

from armt.tasks.stories import (
    OBJECTS,
    OFTEN_ASKED,
    OPPOSITE,
    PLACES,
    Event,
    World,
    ask_map,
    form_of,
    gift_questions,
    map_facts,
    tell_map,
)

TOLD_OF = {"qa1": ("qa1",), "qa3": ("qa1", "qa2", "qa3"), "qa4": ("qa4",), "qa5": ("qa5",)}
"""Kinds of worlds, and the tasks whose questions they answer."""
SHARES = {"qa1": (1.0,), "qa3": (0.1, 0.4, 0.5), "qa4": (1.0,), "qa5": (1.0,)}
"""How often a world is asked a question of each of its tasks."""
KINDS = ("qa1", "qa2", "qa3", "qa4", "qa5", "who")
"""Kinds of questions: the tasks, and one step on the way to qa2 and qa3."""
WHO = 0.2
"""Of questions about worlds with things, so many are about who has one."""
NEWEST = 0.7
"""Of questions about the map, so many are about the two newest facts."""

Question = tuple[str, str, int]
"""The question, its answer and its kind."""


class Tale(Protocol):
    """What happens, and what can be asked."""

    def tell(self) -> str:
        """The next sentence."""
        ...

    def ask(self) -> Question | None:
        """A question that the told sentences decide."""
        ...

    def to_json(self) -> Any: ...

    def restore(self, found: Any) -> None: ...


def new_tale(kind: str, rng: random.Random) -> Tale:
    """A new story of one of the kinds of ``TOLD_OF``."""
    if kind == "qa4":
        return MapTale(rng)
    return GiftTale(rng) if kind == "qa5" else WalkTale(kind, rng)


class WalkTale:
    """People walk, take and put down: qa1, qa2, qa3."""

    def __init__(self, kind: str, rng: random.Random) -> None:
        self._kind, self._rng = kind, rng
        self._world = World(kind, rng)
        self._at: dict[str, str] = {}
        self._holder: dict[str, str] = {}
        self._place: dict[str, str] = {}
        """Where a thing was told to be."""
        self._before: dict[str, dict[str, str]] = {thing: {} for thing in OBJECTS}
        """Thing and place: the place before its newest stay there."""

    def tell(self) -> str:
        sentence = self._world.happen()
        self._note(self._world.events.pop())
        return sentence

    def _note(self, event: Event) -> None:
        person, what = event.person, event.what
        if event.kind == "move":
            self._at[person] = what
            for thing, holder in self._holder.items():
                if holder == person:
                    self._carry(thing, what)
        elif event.kind == "get":
            self._holder[what] = person
            self._carry(what, self._at.get(person))
        else:
            self._holder.pop(what, None)

    def _carry(self, thing: str, place: str | None) -> None:
        was = self._place.get(thing)
        if place is None:  # taken at a place that was not told
            self._place.pop(thing, None)
            self._before[thing].clear()
        elif was != place:
            if was is not None:
                self._before[thing][place] = was
            self._place[thing] = place

    def ask(self) -> Question | None:
        if self._kind == "qa3" and self._holder and self._rng.random() < WHO:
            thing = self._rng.choice(list(self._holder))
            return f"Who has the {thing}?", self._holder[thing], 5
        moved = [thing for thing, places in self._before.items() if places]
        possible = {"qa1": self._at, "qa2": self._place, "qa3": moved}
        shares = zip(TOLD_OF[self._kind], SHARES[self._kind], strict=True)
        left = {task: share for task, share in shares if possible[task]}
        if not left:
            return None
        task = self._rng.choices(list(left), list(left.values()))[0]
        if task == "qa1":
            person = self._rng.choice(list(self._at))
            return f"Where is {person}?", self._at[person], 0
        if task == "qa2":
            thing = self._rng.choice(list(self._place))
            return f"Where is the {thing}?", self._place[thing], 1
        thing = self._rng.choice(moved)
        place = self._rng.choice(list(self._before[thing]))
        return f"Where was the {thing} before the {place}?", self._before[thing][place], 2

    def to_json(self) -> Any:
        known = (self._at, self._holder, self._place, self._before)
        return [_world_to_json(self._world), *known]

    def restore(self, found: Any) -> None:
        world, self._at, self._holder, self._place, self._before = found
        _restore_world(self._world, world)


class GiftTale:
    """People walk, take, put down and give: qa5."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._world = World("qa5", rng)
        self._known: dict[str, dict[str, str]] = {}
        """Form of question, question: answer."""

    def tell(self) -> str:
        sentence = self._world.happen()
        event = self._world.events.pop()
        if event.kind == "give":
            for question, answer in gift_questions(event):
                self._known.setdefault(form_of(question), {})[question] = answer
        return sentence

    def ask(self) -> Question | None:
        if not self._known:
            return None
        form = self._rng.choice([*self._known, OFTEN_ASKED])
        question = self._rng.choice(list(self._known[form]))
        return question, self._known[form][question], 4

    def to_json(self) -> Any:
        return [_world_to_json(self._world), self._known]

    def restore(self, found: Any) -> None:
        world, self._known = found
        _restore_world(self._world, world)


class MapTale:
    """Places in a line, three at a time; newer facts replace older ones of the same side: qa4."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._side: dict[str, dict[str, str]] = {place: {} for place in PLACES}
        """Place and direction: what is there."""
        self._waiting: list[tuple[str, str, str]] = []
        self._newest: list[tuple[str, str, str]] = []

    def tell(self) -> str:
        if not self._waiting:
            self._waiting = map_facts(self._rng)
        place, direction, other = fact = self._waiting.pop()
        self._side[other][direction] = place
        self._side[place][OPPOSITE[direction]] = other
        self._newest = [*self._newest[-1:], fact]
        return tell_map(*fact)

    def ask(self) -> Question | None:
        rng = self._rng
        if not self._newest:
            return None
        if rng.random() < NEWEST:
            place, direction, other = rng.choice(self._newest)
            if rng.random() < 0.5:
                place, direction, other = other, OPPOSITE[direction], place
        else:
            other = rng.choice([place for place, sides in self._side.items() if sides])
            direction = rng.choice(list(self._side[other]))
        return ask_map(rng, direction, other), self._side[other][direction], 3

    def to_json(self) -> Any:
        return [self._side, self._waiting, self._newest]

    def restore(self, found: Any) -> None:
        self._side, self._waiting, self._newest = found


def _world_to_json(world: World) -> Any:
    return [world._at, world._lies, world._held]


def _restore_world(world: World, found: Any) -> None:
    world._at, world._lies, world._held = found


def rng_to_json(rng: random.Random) -> Any:
    """The state of Python's generator."""
    version, values, rest = rng.getstate()
    return [version, list(values), rest]


def restore_rng(rng: random.Random, found: Any) -> None:
    """The reverse of :func:`rng_to_json`."""
    version, values, rest = found
    rng.setstate((version, tuple(values), rest))
