"""Run with an installed wheel, outside the source tree: is everything in it that belongs there?"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path

import armt

FILES = (
    "py.typed",
    "_core/__init__.pyi",
    "_core/testing.pyi",
    "demo/material.json",
    "models/babilong/config.json",
    "models/babilong/model.safetensors",
    "models/babilong/tokenizer.json",
    "models/retrieval/config.json",
    "models/retrieval/model.safetensors",
    "server/page.html",
)


def main() -> None:
    package = resources.files("armt")
    missing = [name for name in FILES if not package.joinpath(name).is_file()]
    assert not missing, f"the wheel lacks {missing}"
    engine = armt.Engine.from_pretrained("demo", device="cpu")
    session = engine.session()
    session.feed(list(range(3, 2003)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.armt-state"
        session.state.save(path)
        later = engine.session(state=armt.State.load(path))
    assert list(later.generate(8)) == list(session.generate(8)), "a loaded state differs"
    print(f"armt {armt.__version__} is whole: {engine.description}")


if __name__ == "__main__":
    main()
