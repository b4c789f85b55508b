"""``armt convert``: any checkpoint that loads, written as the project's own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from armt.cli.options import Json, Model


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float32, bfloat16 or float16. [default: as stored]",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A LoRA folder to merge.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes a checkpoint as config.json and model.safetensors in this project's own form.

    Adapters are merged and tokenizer files copied. The folder appears complete or not at all.

    Example:

    \b
      armt convert checkpoint-5000 my-model --dtype bfloat16
    """
    from armt.checkpoint import describe, export_folder, load_checkpoint
    from armt.cli.loading import reading_weights
    from armt.cli.output import print_json, say, size
    from armt.models import resolve

    source = load_checkpoint(resolve(model), adapter=adapter)
    with reading_weights(source, "converting") as shown:
        folder = export_folder(shown, out, dtype=dtype)  # type: ignore[arg-type]
    _keep_text_settings(source.folder / "config.json", folder / "config.json")
    facts = describe(load_checkpoint(folder))
    if as_json:
        print_json(facts)
        return
    print(folder)
    say(
        f"wrote {facts['parameters']['total']:,} parameters as {facts['weights']['dtype']}, "
        f"{size(facts['weights']['bytes'])}; converted on the CPU"
    )


def _keep_text_settings(source: Path, target: Path) -> None:
    """The object "text" of config.json goes along."""
    from armt.files import whole_file

    config: dict[str, Any] = json.loads(source.read_text("utf-8")) if source.is_file() else {}
    if "text" in config:
        written = json.loads(target.read_text("utf-8")) | {"text": config["text"]}
        with whole_file(target) as path:
            path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
