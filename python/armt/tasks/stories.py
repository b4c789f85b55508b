"""Own stories of the five bAbI kinds: a small world whose people walk, carry, hand over and drop.

The world has a hidden beginning (everybody and everything is somewhere); a story tells only what
happens then. A question is asked only where the told events alone decide the answer:

* qa1: where is a person? The person's last move.
* qa2: where is an object? Who carried it or put it down, and where that person had last moved.
* qa3: where was an object before it was at some place? The moves that brought it to both.
* qa4: three places in a line; what is north of one of them?
* qa5: who gave what to whom? The last gift that fits.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from armt.errors import InvalidArgument

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
GIVERS = ("Mary", "Fred", "Bill", "Jeff")
"""The people of qa5."""
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("moved", "went", "went back", "journeyed", "travelled")
GETS = ("got", "took", "grabbed", "picked up")
DROPS = ("left", "dropped", "discarded", "put down")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
QUESTIONS_A_STORY = 5
SENTENCES_A_STEP = 2
"""After so many sentences a question may come."""
RECENT = 5
"""The answer needs one of so many last sentences, as in the published files."""
LONGEST = 200
"""Sentences after which a story without five questions is told anew."""

Kind = Literal["move", "get", "drop", "give"]
ASKING = {"qa2": 0.75, "qa3": 0.28}
"""How often a question is asked when one is possible."""
OFTEN_ASKED = "What did"
"""The form of qa5's questions that comes twice as often as each other."""
ACTING = {"qa1": 0.0, "qa2": 0.62, "qa3": 0.62, "qa5": 0.74}
"""How often somebody does something other than walking, where there is something to do;
a gift comes first."""


@dataclass(frozen=True)
class Item:
    """A story up to a question, and the answer."""

    sentences: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]
    """Indices of the sentences that the answer follows from, in the order of the reasoning."""


@dataclass(frozen=True)
class Event:
    """One told sentence: who did what with what (a place or an object), and to whom."""

    kind: Kind
    person: str
    what: str
    other: str = ""


def generate(task: str, seed: int) -> Item:
    """One random story of a kind with one question; the same seed gives the same item."""
    rng = random.Random(f"{task} {seed}")
    return rng.choice(_story(task, rng))


def generate_story(task: str, seed: int) -> list[Item]:
    """One story with its questions in order (five, in qa4 one); an item holds all sentences
    before its question."""
    return _story(task, random.Random(f"{task} {seed}"))


def generate_many(task: str, count: int, seed: int = 0) -> list[Item]:
    """``count`` items, as :func:`generate` gives them for seeds that ``seed`` draws."""
    rng = random.Random(f"many {task} {seed}")
    return [generate(task, rng.getrandbits(48)) for _ in range(count)]


def check_task(task: str) -> str:
    """``task`` if it is one of the five; InvalidArgument otherwise."""
    if task not in TASKS:
        raise InvalidArgument(f"task: found {task!r}, expected one of {', '.join(TASKS)}")
    return task


def _story(task: str, rng: random.Random) -> list[Item]:
    if check_task(task) == "qa4":
        return [_map_item(rng)]
    while True:
        items = _try_story(task, rng)
        if len(items) == QUESTIONS_A_STORY:
            return items


def _try_story(task: str, rng: random.Random) -> list[Item]:
    world = World(task, rng)
    sentences: list[str] = []
    items: list[Item] = []
    while len(items) < QUESTIONS_A_STORY and len(sentences) < LONGEST:
        sentences += [world.happen() for _ in range(SENTENCES_A_STEP)]
        asked = _ask(task, world.events, rng)
        if asked is not None:
            question, (answer, supporting) = asked
            items.append(Item(tuple(sentences), question, answer, supporting))
    return items


@dataclass
class World:
    """Where everybody and everything is, told or not."""

    task: str
    rng: random.Random
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        people = GIVERS if self.task == "qa5" else PEOPLE
        self._at = {person: self.rng.choice(PLACES) for person in people}
        self._lies = {thing: self.rng.choice(PLACES) for thing in OBJECTS}
        self._held: dict[str, str] = {}

    def happen(self) -> str:
        """The next event, as a sentence."""
        person = self.rng.choice(list(self._at))
        deeds = self._deeds(person)
        if deeds and self.rng.random() < ACTING[self.task]:
            kinds = {deed.kind for deed in deeds}
            kind = "give" if "give" in kinds else self.rng.choice(sorted(kinds))
            event = self.rng.choice([deed for deed in deeds if deed.kind == kind])
        else:
            places = [place for place in PLACES if place != self._at[person]]
            event = Event("move", person, self.rng.choice(places))
        self._apply(event)
        self.events.append(event)
        return tell(self.task, event, self.rng)

    def _deeds(self, person: str) -> list[Event]:
        """All that ``person`` can do but walk."""
        if not ACTING[self.task]:
            return []
        here = self._at[person]
        mine = [thing for thing, holder in self._held.items() if holder == person]
        deeds = [
            Event("get", person, thing) for thing, place in self._lies.items() if place == here
        ]
        deeds += [Event("drop", person, thing) for thing in mine]
        if self.task == "qa5":
            near = [other for other, place in self._at.items() if place == here and other != person]
            deeds += [Event("give", person, thing, other) for thing in mine for other in near]
        return deeds

    def _apply(self, event: Event) -> None:
        if event.kind == "move":
            self._at[event.person] = event.what
        elif event.kind == "get":
            del self._lies[event.what]
            self._held[event.what] = event.person
        elif event.kind == "drop":
            del self._held[event.what]
            self._lies[event.what] = self._at[event.person]
        else:
            self._held[event.what] = event.other


def tell(task: str, event: Event, rng: random.Random) -> str:
    """An event in words."""
    if event.kind == "move":
        return f"{event.person} {rng.choice(MOVES)} to the {event.what}."
    if event.kind == "give":
        return f"{event.person} {rng.choice(GIVES)} the {event.what} to {event.other}."
    if event.kind == "get":
        there = task != "qa3" or rng.random() < 0.22
        verb = rng.choice(GETS)
    else:
        there = rng.random() < 0.2
        verb = rng.choice(DROPS)
    return f"{event.person} {verb} the {event.what}{' there' if there else ''}."


Known = dict[str, tuple[str, tuple[int, ...]]]
"""Question: answer and supporting sentences."""


def _ask(
    task: str, events: Sequence[Event], rng: random.Random
) -> tuple[str, tuple[str, tuple[int, ...]]] | None:
    """A question that the told events decide; None where there is none, or none is asked now."""
    recent = len(events) - RECENT
    known = [item for item in questions(task, events).items() if max(item[1][1]) >= recent]
    if not known or rng.random() > ASKING.get(task, 1.0):
        return None
    if task == "qa5":
        forms: dict[str, list[tuple[str, tuple[str, tuple[int, ...]]]]] = {}
        for entry in known:
            forms.setdefault(form_of(entry[0]), []).append(entry)
        return rng.choice(forms[rng.choice([*forms, OFTEN_ASKED])])
    return rng.choice(known)


def form_of(question: str) -> str:
    """Which of qa5's questions this is."""
    words = question.split()
    return " ".join(words[:2] if words[1] == "did" else [*words[:2], str(len(words))])


def questions(task: str, events: Sequence[Event]) -> Known:
    """Every question that the told events decide."""
    if task == "qa1":
        places = {e.person: i for i, e in enumerate(events) if e.kind == "move"}
        return {f"Where is {p}?": (events[i].what, (i,)) for p, i in places.items()}
    if task == "qa5":
        return _gifts(events)
    known: Known = {}
    for thing in OBJECTS:
        last, visits = trail(events, thing)
        place = events[visits[-1]].what if visits else ""
        if task == "qa2" and visits:
            if events[last].kind == "drop" or visits[-1] > last:
                known[f"Where is the {thing}?"] = (place, (last, visits[-1]))
        elif task == "qa3":
            for before, after in itertools.pairwise(visits):  # the newest visit counts
                question = f"Where was the {thing} before the {events[after].what}?"
                known[question] = (events[before].what, (last, after, before))
    return known


def trail(events: Sequence[Event], thing: str) -> tuple[int, list[int]]:
    """The last event with ``thing`` (-1: none), and the moves that brought it where it was told to
    be, one a place. It is unknown where a thing is that was taken at an unknown place."""
    holder, last = "", -1
    at: dict[str, int] = {}
    visits: list[int] = []
    for i, event in enumerate(events):
        if event.kind == "move":
            at[event.person] = i
            if event.person == holder:
                visits.append(i)
        elif event.what == thing:
            last = i
            if event.kind == "get":
                holder = event.person
                here = at.get(holder)
                if here is None:
                    visits = []
                elif visits and events[visits[-1]].what == events[here].what:
                    visits[-1] = here
                else:
                    visits.append(here)
            else:
                holder = event.other
    return last, visits


def _gifts(events: Sequence[Event]) -> Known:
    known: Known = {}
    for i, event in enumerate(events):
        if event.kind == "give":
            known |= {question: (answer, (i,)) for question, answer in gift_questions(event)}
    return known


def gift_questions(event: Event) -> list[tuple[str, str]]:
    """What a gift answers: questions and their answers."""
    giver, thing, getter = event.person, event.what, event.other
    return [
        (f"What did {giver} give to {getter}?", thing),
        (f"Who gave the {thing} to {getter}?", giver),
        (f"Who gave the {thing}?", giver),
        (f"Who received the {thing}?", getter),
        (f"Who did {giver} give the {thing} to?", getter),
    ]


def map_facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Three places in a line: two facts (place, direction, other), in any order."""
    line = rng.sample(PLACES, 3)
    direction = rng.choice(sorted(OPPOSITE))
    facts = []
    for near, far in ((line[0], line[1]), (line[1], line[2])):
        told = (far, direction, near) if rng.random() < 0.5 else (near, OPPOSITE[direction], far)
        facts.append(told)
    rng.shuffle(facts)
    return facts


def tell_map(place: str, direction: str, other: str) -> str:
    """A fact of the map in words."""
    return f"The {place} is {direction} of the {other}."


def ask_map(rng: random.Random, side: str, place: str) -> str:
    """What lies on that side of the place? In one of two forms."""
    if rng.random() < 0.5:
        return f"What is {side} of the {place}?"
    return f"What is the {place} {OPPOSITE[side]} of?"


def _map_item(rng: random.Random) -> Item:
    """Three places in a line, told by their neighbours; one is asked for."""
    facts = map_facts(rng)
    index = rng.randrange(2)
    answer, side, place = facts[index]
    question = ask_map(rng, side, place)
    return Item(tuple(tell_map(*fact) for fact in facts), question, answer, (index,))
