"""The models in PyTorch: what they compute is what the engine computes, and what PyTorch carries on
from piece to piece is what it would have read at once."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.tasks.reading import EngineReader

torch = pytest.importorskip("torch", reason='needs the extra "torch"')

from armt.training.decoder import Asks  # noqa: E402
from armt.training.folder import load_weights, write_model  # noqa: E402
from armt.training.reader import TorchReader  # noqa: E402
from armt.training.start import start  # noqa: E402
from armt.training.systems import Shape, build  # noqa: E402

SLACK = 8
"""Our error against float64, in PyTorch's own float32 errors: random tokens meet small
denominators, which make more of any rounding."""
LARGEST = 1e-3
"""Of the largest value."""
SIZES: dict[str, Any] = {"width": 32, "layers": 3, "heads": 4, "memory_tokens": 3, "d_mem": 5}
KINDS: dict[str, dict[str, Any]] = {
    "modern": {},
    "modern, divided": {"denominator": True},
    "paper": {"dialect": "paper"},
    "rmt": {"system": "rmt"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(before)


def make(kind: str, **changes: Any) -> Any:
    shape = Shape(50, 13, **(SIZES | KINDS.get(kind, {"system": kind}) | changes))
    model = build(shape)
    if kind != "mamba":
        start(model, [1, 2, 3])
    return model


def read(model: Any, ids: Any) -> tuple[Any, Any]:
    """Logits of all tokens, and the state behind the last full segment."""
    state, logits = model.empty(len(ids)), []
    for part in torch.split(torch.from_numpy(ids), model.shape.segment_size, dim=1):
        x, _, state, _ = model.segment(part, state)
        logits.append(model.decoder.logits(x))
    return torch.cat(logits, dim=1), state


def assert_close(found: Any, single: Any, exact: Any) -> None:
    """``found`` is as near to float64 as PyTorch's own float32 is, within a small factor."""
    scale = float(exact.abs().max())
    error = float(np.abs(found - exact.numpy()).max())
    own = float((single.double() - exact).abs().max())
    assert error <= 1e-5 * scale + SLACK * own, (error, own, scale)
    assert error <= LARGEST * scale, (error, scale)


def test_a_fresh_memory_does_not_grow_without_an_end() -> None:
    model = make("modern", width=64, layers=8, memory_tokens=16, d_mem=32)
    tokens = torch.randint(0, 50, (2, 60, 13))
    state, norms = model.empty(2), []
    with torch.no_grad():
        for segment in range(60):
            _, _, state, _ = model.segment(tokens[:, segment], state)
            norms.append(max(float(a.norm()) for a in state))
    assert norms[-1] < 1.5 * norms[29], norms
    assert norms[29] < 4 * norms[9], norms


@pytest.mark.parametrize("tokens", [3, 13, 14, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_agrees(tmp_path: Path, kind: str, tokens: int) -> None:
    model = make(kind)
    write_model(tmp_path, model.state_dict(), model.shape.config())
    engine = armt.Engine.from_pretrained(tmp_path, device="cpu", dtype="float32", threads=1)
    ids = np.random.default_rng(tokens).integers(0, 50, (2, tokens))
    with torch.no_grad():
        logits, state = read(model, ids)
        exact, exact_state = read(deepcopy(model).double(), ids)
    found = engine.forward(ids)
    assert_close(found.logits, logits, exact)
    if kind == "rmt":
        return
    layers = model.shape.layers
    for row, mine in enumerate(found.states):
        for layer in range(layers):
            a, z = mine.memory(layer)
            assert_close(a[0], state[layer][row], exact_state[layer][row])
            if model.shape.divided:
                assert_close(z[0], state[layers + layer][row], exact_state[layers + layer][row])


def test_names_and_shapes_are_the_published_ones() -> None:
    found = {name: tuple(t.shape) for name, t in make("paper", layers=1).state_dict().items()}
    layer = "memory_cell.model.transformer.h.0."
    assert found["memory_cell.memory"] == (3, 32)
    assert found["memory_cell.model.transformer.wpe.weight"] == (16, 32)
    assert found[f"{layer}W_mq.weight"] == (5, 32)
    assert found[f"{layer}W_mb.bias"] == (1,)
    assert found[f"{layer}layer.attn.c_attn.weight"] == (32, 96)
    assert len(found) == 1 + 2 + 2 + 5 + 12
    assert make("rmt").state_dict()["memory_cell.model.transformer.wpe.weight"].shape == (19, 32)


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_questions_see_what_stands_before_them_and_leave_no_trace(kind: str) -> None:
    model = make(kind)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 50, (2, 26)))
    asked = torch.from_numpy(rng.integers(0, 50, (2, 4, 3)))
    seen = torch.tensor([[0, 5, 10, 3], [0, 1, 2, 10]])
    last = torch.tensor([[2, 1, 2, 0], [2, 2, 2, 1]])
    asks = Asks(asked, seen, last)
    with torch.no_grad():
        _, _, state, _ = model.segment(ids[:, :13], model.empty(2))
        plain, _, after, _ = model.segment(ids[:, 13:], state)
        x, found, new, _ = model.segment(ids[:, 13:], state, asks)
        torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-5)
        for one, other in zip(after, new, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for row in range(2):
            mine = tuple(part[row : row + 1] for part in state)
            for i in range(4):
                end = int(last[row, i]) + 1
                text = torch.cat((ids[row, 13 : 13 + int(seen[row, i])], asked[row, i, :end]))
                alone, _, _, _ = model.segment(text[None], mine, write=False)
                torch.testing.assert_close(alone[0, -1], found[row, i], rtol=1e-4, atol=1e-4)


def test_mamba_reads_in_pieces_of_any_size() -> None:
    model = make("mamba", state_size=8)
    ids = np.random.default_rng(1).integers(0, 50, (2, 150))
    with torch.no_grad():
        whole, _, state, _ = model.segment(torch.from_numpy(ids), model.empty(2))
        parts, now = [], model.empty(2)
        for part in np.split(ids, [1, 3, 20, 130], axis=1):
            x, _, now, _ = model.segment(torch.from_numpy(part), now)
            parts.append(x)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    for one, other in zip(state, now, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_the_gradient_reaches_every_weight(kind: str) -> None:
    model = make(kind)
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 50, (4, 26)))
    _, _, state, _ = model.segment(ids[:, :13], model.empty(4))
    x, _, _, _ = model.segment(ids[:, 13:], state)
    model.decoder.logits(x).logsumexp(-1).sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    if kind == "rmt":  # its last write leads nowhere
        assert all("wpe" in name for name in without)
    else:
        assert without == set()


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_the_reader_reads_what_a_folder_holds(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    write_model(tmp_path, model.state_dict(), model.shape.config())
    reader = TorchReader(tmp_path)
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 50, n).astype(np.int32) for n in (30, 13, 0, 40)]
    asked = [rng.integers(0, 50, n).astype(np.int32) for n in (2, 3, 1, 20)]
    reader.open(4)
    for first in (0, 7, 20):
        size = {0: 7, 7: 13, 20: 100}[first]
        reader.feed([text[first : first + size] for text in texts])
    before = reader.ask_logits(asked)
    np.testing.assert_array_equal(before, reader.ask_logits(asked))
    for row, (text, question) in enumerate(zip(texts, asked, strict=True)):
        with torch.no_grad():
            logits, _ = read(model, np.concatenate([text, question])[None].astype(np.int64))
        np.testing.assert_allclose(before[row], logits[0, -1], rtol=1e-3, atol=1e-3)
    if kind == "mamba":
        return
    engine = EngineReader(armt.Engine.from_pretrained(tmp_path, device="cpu", dtype="float32"))
    engine.open(4)
    engine.feed(texts)
    np.testing.assert_allclose(engine.ask_logits(asked), before, rtol=1e-3, atol=1e-3)


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    model = make("modern")
    write_model(tmp_path, model.state_dict(), model.shape.config(), dtype="float16")
    other = make("modern")
    load_weights(other, tmp_path)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], values.half().float())
    with pytest.raises(armt.InvalidArgument, match="does not fit"):
        load_weights(make("modern", layers=2), tmp_path)


def test_only_writes_of_more_than_a_rows_length_are_beyond_measure() -> None:
    model = make("modern")
    layer = model.decoder.h[1]
    y = torch.randn(2, 3, 32)
    with torch.no_grad():
        torch.nn.init.eye_(layer.W_mv.weight)
        for scale, beyond in ((1.0, False), (1e3, True)):
            *_, written = layer.write(scale * y, torch.zeros(2, 30, 32), torch.zeros(2, 30))
            assert written.shape == (2, 2)
            assert (written[:, 0] > 0.1).all()
            assert (written[:, 1] > 1).all() if beyond else (written[:, 1] == 0).all(), written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "lstm"}, "system: found 'lstm'"),
        ({"dialect": "old"}, "dialect"),
        ({"width": 30}, "divisor of the width 30"),
        ({"layers": 0}, "layers: found 0"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(armt.InvalidArgument, match=message):
        Shape(50, 13, **(SIZES | change))


def test_folders_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dialect": "paper", "base_model": {}}')
    with pytest.raises(armt.CheckpointError, match="armt train"):
        TorchReader(tmp_path)
