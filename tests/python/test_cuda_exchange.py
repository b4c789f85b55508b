"""Tensors of torch on a GPU: ids in, logits out, in the order of streams; NaNs there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_nonfinite import poisoned, written

import armt
from armt import _core
from variants import VARIANTS, Variant, Zoo

GPU = pytest.mark.skipif(_core.cuda_device_count() == 0, reason="no GPU can be used here")
VARIANT = next(v for v in VARIANTS if v.name == "modern-llama")


def cuda(zoo: Zoo, variant: Variant = VARIANT, **options: Any) -> armt.Engine:
    zoo.model(variant)
    return armt.Engine.from_pretrained(zoo.path(variant, "F32"), device="cuda", **options)


@pytest.fixture()
def torch() -> Any:
    module = pytest.importorskip("torch", reason="needs torch")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


@GPU
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_ids_on_the_gpu(zoo: Zoo, torch: Any, dtype: str) -> None:
    engine = cuda(zoo)
    ids = zoo.model(VARIANT).tokens((2, 30), seed=1)
    expected = engine.session().feed(ids[0], logits="all").logits
    there = torch.tensor(ids, dtype=getattr(torch, dtype), device="cuda")
    for view in (there[0], there.t().contiguous().t()[0], there.repeat_interleave(2, 1)[0, ::2]):
        np.testing.assert_array_equal(engine.session().feed(view, logits="all").logits, expected)
    mask = torch.ones_like(there, dtype=torch.bool)
    mask[1, 20:] = False
    found = engine.forward(there, mask).logits
    np.testing.assert_array_equal(found, engine.forward(ids, mask.cpu().numpy()).logits)
    rows = engine.generate(there, max_new_tokens=3)
    np.testing.assert_array_equal(rows, engine.generate(ids, max_new_tokens=3))


@GPU
def test_ids_come_in_the_order_of_their_stream(zoo: Zoo, torch: Any) -> None:
    engine = cuda(zoo)
    ids = zoo.model(VARIANT).tokens((1, 30), seed=2)[0]
    expected = engine.session().feed(ids, logits="last").logits
    busy = torch.randn(4096, 4096, device="cuda")
    source = torch.tensor(ids, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(source)
            for _ in range(20):
                busy = busy @ busy * 1e-4
            late.copy_(source)  # long after the call below begins
            found = engine.session().feed(late, logits="last").logits
        np.testing.assert_array_equal(found, expected)


@GPU
def test_logits_stay_on_the_gpu(zoo: Zoo, torch: Any) -> None:
    engine = cuda(zoo)
    ids = zoo.model(VARIANT).tokens((1, 40), seed=3)[0]
    for logits in ("last", "all"):
        expected = engine.session().feed(ids, logits=logits).logits
        out = engine.session().feed(ids, logits=logits, logits_on="device")
        assert out.logits is None and out.device_logits is not None
        assert out.device_logits.__dlpack_device__() == (2, 0)
        tensor = torch.from_dlpack(out.device_logits)
        assert (
            tensor.is_cuda and tensor.data_ptr() == torch.from_dlpack(out.device_logits).data_ptr()
        )
        np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
        np.testing.assert_array_equal(np.asarray(out.device_logits), expected)
        del out  # the tensor keeps the memory
        engine.session().feed(ids, logits=logits, logits_on="device")
        np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
    rows = engine.step_many(
        [(engine.session(), ids[:3]), (engine.session(), ids[:7])], logits_on="device"
    )
    assert [row.tokens for row in rows] == [3, 7]
    assert all(row.device_logits is not None for row in rows)


@GPU
def test_tensors_outlive_the_engine(zoo: Zoo, torch: Any) -> None:
    engine = cuda(zoo)
    out = engine.session().step([1, 2, 3], logits_on="device")
    expected = np.asarray(out.device_logits)
    tensor = torch.from_dlpack(out.device_logits)
    del engine, out
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)


@GPU
def test_tensors_on_another_device_are_refused(zoo: Zoo, torch: Any) -> None:
    ids = torch.tensor([1, 2, 3], device="cuda")
    with pytest.raises(armt.InvalidArgument, match="found a tensor on cuda:0, expected one in"):
        zoo.engine(VARIANT, threads=1).session().feed(ids)
    with pytest.raises(armt.InvalidArgument, match="integer"):
        cuda(zoo).session().feed(ids.float())


class Elsewhere:
    """Looks like a tensor on the second GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 1)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("it was asked for its data")


def test_a_tensor_elsewhere_is_not_touched(zoo: Zoo) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    session = engine.session()
    for call in (
        lambda: session.feed(Elsewhere()),
        lambda: session.step(Elsewhere()),
        lambda: session.score(Elsewhere()),
        lambda: engine.forward(Elsewhere()),
        lambda: engine.forward([[1, 2]], Elsewhere()),
        lambda: engine.generate(Elsewhere()),
    ):
        with pytest.raises(armt.InvalidArgument, match="on cuda:1, expected one in host memory"):
            call()
    assert session.tokens == 0


def test_device_logits_of_a_cpu_engine(zoo: Zoo) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    ids = zoo.model(VARIANT).tokens((1, 20), seed=5)[0]
    expected = engine.session().feed(ids, logits="all").logits
    out = engine.session().feed(ids, logits="all", logits_on="device")
    assert out.logits is None and out.device_logits is not None
    np.testing.assert_array_equal(np.from_dlpack(out.device_logits), expected)
    np.testing.assert_array_equal(np.asarray(out.device_logits, np.float64), expected)
    assert out.device_logits.shape == expected.shape
    nothing = engine.session().feed(ids, logits_on="device")
    assert nothing.logits is None and nothing.device_logits is None
    with pytest.raises(armt.InvalidArgument, match="logits_on"):
        engine.session().feed(ids, logits="all", logits_on="gpu")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        out.device_logits.__dlpack__(dl_device=(2, 0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_non_finite_device_logits_are_an_error(zoo: Zoo, device: str) -> None:
    engine = cuda(zoo) if device == "cuda" else zoo.engine(VARIANT, threads=1)
    session = engine.session(state=poisoned(written(engine).state, 1, np.nan))
    before = session.state.to_bytes()
    with pytest.raises(armt.NonFiniteError, match="logits"):
        session.feed([1], logits="last", logits_on="device")
    with pytest.raises(armt.NonFiniteError, match="segment 1, layer 1 and above"):
        session.step([1, 2, 3], logits="none")
    assert session.state.to_bytes() == before
