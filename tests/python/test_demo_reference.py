"""The demo's model answers through the engine as through the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import armt
from armt.demo.story import Story, answer_text, people, question
from armt.models import DEFAULT, resolve
from reference import Model, load_folder, start_generation

SAMPLES = {2: 8, 8: 4, 32: 2}
MORE_SAMPLES = {2: 64, 8: 32, 32: 8, 64: 8, 256: 4}
"""Segments of a sample, and samples: (default) about half a minute; (--long-run) many minutes."""
LARGEST_DIFFERENCE = 2e-3  # of logits around 10, after 32 segments of float32


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained(resolve(DEFAULT), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reference() -> Model:
    return load_folder(resolve(DEFAULT))


def sample(segments: int, seed: int, size: int) -> tuple[Any, str]:
    """Ids of a story with its question, a little less than ``segments`` segments, and the truth."""
    person = people()[seed % len(people())]
    _, asked = question(person)
    story = Story(segments * size - len(asked) - 8, 2 * segments, seed)
    told = story.read(story.tokens)
    fact = story.last_fact(person)
    assert fact is not None
    return np.concatenate([told, asked]), fact.place


@pytest.mark.parametrize("segments", sorted({*SAMPLES, *MORE_SAMPLES}))
def test_accuracy_equals_that_of_the_reference(
    engine: armt.Engine, reference: Model, segments: int, long_run: bool
) -> None:
    count = (MORE_SAMPLES if long_run else SAMPLES).get(segments, 0)
    if count == 0:
        pytest.skip(f"{segments} segments take minutes in float64 (use --long-run)")
    rows = [sample(segments, 100 + seed, engine.segment_size) for seed in range(count)]
    right = expected_right = 0
    for ids, place in rows:
        with engine.session() as session:
            found = session.feed(ids, logits="last").logits
        assert found is not None
        expected = start_generation(reference, ids[None]).logits[0]
        assert np.abs(found - expected).max() < LARGEST_DIFFERENCE
        assert int(found.argmax()) == int(expected.argmax())
        right += answer_text(int(found.argmax())) == place
        expected_right += answer_text(int(expected.argmax())) == place
    assert right == expected_right
    assert right >= 0.75 * count
