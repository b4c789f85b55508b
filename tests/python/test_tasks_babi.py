"""bAbI stories, published and our own: what is told follows from what happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import armt
from armt.tasks.babi import find_file, make_sentences, read_items
from armt.tasks.stories import (
    GETS,
    OBJECTS,
    PLACES,
    RECENT,
    TASKS,
    Event,
    Item,
    generate,
    generate_many,
    generate_story,
    questions,
)

BABI = """1 Mary went to the office.
2 John moved to the garden.
3 Where is Mary? \toffice\t1
4 Mary went back to the kitchen.
5 Where is Mary? \tkitchen\t4
1 Sandra went to the bathroom.
2 Where is Sandra? \tbathroom\t1
"""
STORIES = ("qa1", "qa2", "qa3", "qa5")


def understood(sentence: str) -> Event:
    """A sentence as an event, by its words alone."""
    words = sentence.rstrip(".").split()
    place = next((word for word in words if word in PLACES), "")
    if place:
        return Event("move", words[0], place)
    thing = next(word for word in words if word in OBJECTS)
    if " to " in sentence:
        return Event("give", words[0], thing, words[-1])
    took = any(f" {verb} " in sentence for verb in GETS)
    return Event("get" if took else "drop", words[0], thing)


def follows(task: str, item: Item) -> bool:
    """Whether answer and supporting sentences are what the sentences say."""
    known = questions(task, [understood(sentence) for sentence in item.sentences])
    return known.get(item.question) == (item.answer, item.supporting)


@pytest.mark.parametrize("task", STORIES)
def test_published_stories_follow_from_their_sentences(
    task: str, shared: Callable[[str], Path]
) -> None:
    for split in ("test", "valid"):
        items = read_items(find_file(shared("babi"), task, split=split))
        wrong = sum(not follows(task, item) for item in items)
        # Two or three of qa5's published answers are not the last matching gift.
        assert len(items) == 1000 and wrong <= (3 if task == "qa5" else 0)


@pytest.mark.parametrize("task", STORIES)
def test_own_stories_follow_from_their_sentences(task: str) -> None:
    for seed in range(60):
        items = generate_story(task, seed)
        assert len(items) == 5
        for item in items:
            assert follows(task, item), item
            assert max(item.supporting) >= len(item.sentences) - RECENT
        for before, after in itertools.pairwise(items):
            assert after.sentences[: len(before.sentences)] == before.sentences
    assert len({i.answer for i in generate_many(task, 300)}) >= (7 if task == "qa5" else 6)


def test_the_newest_event_decides() -> None:
    walk = [Event("move", "Mary", "office"), Event("get", "Mary", "milk")]
    walk += [Event("move", "Mary", "garden"), Event("drop", "Mary", "milk")]
    walk += [Event("move", "Mary", "kitchen")]
    assert questions("qa1", walk) == {"Where is Mary?": ("kitchen", (4,))}
    assert questions("qa2", walk) == {"Where is the milk?": ("garden", (3, 2))}
    expected = {"Where was the milk before the garden?": ("office", (3, 2, 0))}
    assert questions("qa3", walk) == expected
    gifts = [Event("give", "Mary", "milk", "John"), Event("give", "John", "milk", "Mary")]
    assert questions("qa5", gifts)["Who received the milk?"] == ("Mary", (1,))
    assert questions("qa5", gifts)["Who did Mary give the milk to?"] == ("John", (0,))


def test_own_maps_are_true() -> None:
    for seed in range(200):
        item = generate("qa4", seed)
        at: dict[str, tuple[int, int]] = {}
        step = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
        for sentence in item.sentences:  # "The a is north of the b."
            words = sentence.rstrip(".").split()
            a, side, b = words[1], words[3], words[-1]
            dx, dy = step[side]
            if not at or b in at:
                x, y = at.setdefault(b, (0, 0))
                at[a] = (x + dx, y + dy)
            else:
                x, y = at[a]
                at[b] = (x - dx, y - dy)
        assert len(set(at.values())) == 3
        words = item.question.rstrip("?").split()
        if words[2] == "the":  # "What is the b south of?": b lies south of the answer
            (x, y), (dx, dy) = at[words[3]], step[words[4]]
            assert at[item.answer] == (x - dx, y - dy)
        else:
            (x, y), (dx, dy) = at[words[-1]], step[words[2]]
            assert at[item.answer] == (x + dx, y + dy)
        assert item.answer in item.sentences[item.supporting[0]]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_tells_the_same_story(task: str) -> None:
    assert generate(task, 3) == generate(task, 3) != generate(task, 4)
    assert generate_many(task, 20, seed=1) == generate_many(task, 20, seed=1)
    assert generate_many(task, 20, seed=1) != generate_many(task, 20, seed=2)


@pytest.mark.parametrize("task", TASKS)
def test_own_stories_sound_like_the_published_ones(
    task: str, shared: Callable[[str], Path]
) -> None:
    published = read_items(find_file(shared("babi"), task))
    own = generate_many(task, 1000)

    def words(items: list[Item]) -> set[str]:
        texts = [text for i in items for text in (*i.sentences, i.question, i.answer)]
        return {word.strip(".?") for text in texts for word in text.split()}

    assert words(own) == words(published)
    mean = [sum(len(i.sentences) for i in items) / len(items) for items in (own, published)]
    assert mean[0] == pytest.approx(mean[1], rel=0.35)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "qa1_single_test.txt"
    file.write_text(BABI)
    items = read_items(find_file(tmp_path, "qa1"))
    assert [item.answer for item in items] == ["office", "kitchen", "bathroom"]
    assert items[1].sentences[-1] == "Mary went back to the kitchen."
    assert len(items[1].sentences) == 3 and items[1].supporting == (2,)
    assert items[2].sentences == ("Sandra went to the bathroom.",)
    assert items[0].question == "Where is Mary?" and items[0].supporting == (0,)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("no number here", "line 1"),
        ("1 Mary went to the office.\n", "no question"),
        (
            "1 Mary went to the office.\n2 Where is Mary?\toffice\t7\n",
            "line 2: .*supporting line 7",
        ),
        (b"\xff\xfe\xff", "bAbI file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | bytes, match: str) -> None:
    file = tmp_path / "qa1_x_test.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(armt.InvalidArgument, match=match):
        read_items(file)
    with pytest.raises(armt.InvalidArgument, match="qa2"):
        find_file(tmp_path, "qa2")
    with pytest.raises(armt.InvalidArgument, match="nowhere"):
        find_file(tmp_path / "nowhere", "qa1")


def test_unknown_tasks() -> None:
    with pytest.raises(armt.InvalidArgument, match="qa9"):
        generate("qa9", 0)


def test_made_text_says_nothing_about_the_people() -> None:
    sentences = make_sentences(500, seed=1)
    assert sentences == make_sentences(500, seed=1) != make_sentences(500, seed=2)
    assert not [s for s in sentences if {"Mary", "John", "Sandra", "Daniel"} & set(s.split())]
