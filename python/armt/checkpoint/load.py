"""load_checkpoint: from a path to a Checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from armt.checkpoint import native
from armt.checkpoint.assemble import identical, make_plans
from armt.checkpoint.base_config import read_base
from armt.checkpoint.checkpoint import Checkpoint, common_dtype
from armt.checkpoint.config import (
    GIVE,
    Facts,
    check_overrides,
    generation_of,
    is_hugging_face,
    read_facts,
    token_ids_of,
)
from armt.checkpoint.fields import Fields
from armt.checkpoint.files import inner_path, read_json
from armt.checkpoint.lora import merge_folder, merge_inside
from armt.checkpoint.memory_config import check_limits, position_rows, read_memory
from armt.checkpoint.names import Naming, Sorted, find_prefix, sort_tensors
from armt.checkpoint.problems import Problems
from armt.checkpoint.slots import all_slots
from armt.checkpoint.sources import Stored, find_weights, open_weights
from armt.errors import CheckpointError, InvalidArgument

MOST_TENSORS_PER_LAYER = 1000
PathLike: TypeAlias = str | os.PathLike[str]


def load_checkpoint(
    path: PathLike, *, adapter: PathLike | None = None, **overrides: Any
) -> Checkpoint:
    """Opens a checkpoint: a folder, or a weight file with or without a config.json beside it.

    Understood are official state dicts, Hugging Face folders (nothing in them is executed), LoRA
    inside either or in the separate folder ``adapter``, and folders written by
    :func:`export_folder`. ``overrides`` are facts that files lack or that shall be others:
    ``dialect``, ``base_model`` (a dict or the path of a config.json), ``segment_size``,
    ``segment_alignment``, ``correction``, ``sliding_window``, ``wrap_pos``, ``num_mem_tokens``,
    ``d_mem``, ``n_heads``, ``use_denom``, ``gating``, ``use_sink``, ``nu``, ``cell_prefix``,
    ``lora_alpha``, ``use_rslora``, ``eos_token_id``.

    Weights are mapped and read when :meth:`Checkpoint.tensors` comes to them. Raises
    CheckpointError that lists everything that is wrong with the files, InvalidArgument for unknown
    keyword arguments.
    """
    check_overrides(overrides)
    given = {name: value for name, value in overrides.items() if value is not None}
    found = Path(path)
    adapter_folder = None if adapter is None else Path(adapter)
    try:
        return _load(found, adapter_folder, given)
    except OSError as error:
        raise CheckpointError(f"{found}: cannot be read: {error}") from error


def _load(path: Path, adapter: Path | None, overrides: Mapping[str, Any]) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path}: found nothing there; expected a checkpoint folder or a weight file on this"
            " machine (nothing is downloaded)"
        )
    if path.name == "config.json":
        path = path.parent
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(f"{path}: expected a folder or a regular file")
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if native.is_native(config):
        if adapter is not None or any(name not in native.OVERRIDES for name in overrides):
            raise InvalidArgument(
                f"{folder}: an exported folder takes no adapter, and as keyword arguments only"
                f" {', '.join(native.OVERRIDES)}"
            )
        return native.load_native(folder, config, overrides)
    weights, inner = (path, None) if path.is_file() else _weights_of(folder, config)
    adapter = adapter or _adapter_of(folder, config)
    if inner is not None and (inner / "config.json").is_file():
        return _load(inner, adapter, overrides)
    where = config_path if config else path
    facts = read_facts(config, overrides, str(where))
    return _build(path, weights, facts, adapter, overrides, hub=is_hugging_face(config))


def _weights_of(folder: Path, config: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """(weight file or index, the inner folder if config.json names one)."""
    section = config.get("weights")
    named = section if isinstance(section, Mapping) and not is_hugging_face(config) else {}
    where = str(folder / "config.json")
    if named.get("folder") is not None:
        inner = inner_path(folder, named["folder"], where=where)
        if not inner.is_dir():
            raise CheckpointError(f"{where}: weights.folder: {inner} is not a folder")
        return find_weights(inner), inner
    if named.get("file") is not None:
        file = inner_path(folder, named["file"], where=where)
        if not file.is_file():
            raise CheckpointError(f"{where}: weights.file: {file} does not exist")
        return file, None
    return find_weights(folder), None


def _adapter_of(folder: Path, config: Mapping[str, Any]) -> Path | None:
    section = config.get("weights")
    name = section.get("adapter_folder") if isinstance(section, Mapping) else None
    if name is None:
        return None
    return inner_path(folder, name, where=str(folder / "config.json"))


def _build(
    path: Path,
    weights: Path,
    facts: Facts,
    adapter: Path | None,
    overrides: Mapping[str, Any],
    *,
    hub: bool,
) -> Checkpoint:
    problems = Problems(facts.where)
    # The configuration of the base model says how tensors are called, so it goes first.
    base = read_base(facts.base_model, {}, Problems(facts.where))
    if base is None:
        read_base(facts.base_model, {}, problems)
        problems.raise_if_any(GIVE + ".")
        raise AssertionError("an unknown base model is a problem")
    stored = _all_tensors(weights, layers=base.decoder["n_layers"])
    prefix = facts.cell_prefix
    if prefix is None:
        prefix = find_prefix((tensor.name for tensor in stored), facts.dialect)
    naming = Naming(prefix, base.family, wrapped_layers=facts.dialect != "rmt")
    tensor_problems = Problems(str(weights))
    tensors = sort_tensors(stored, naming, tensor_problems)
    merged = _merge_lora(tensors.tensors, naming, facts, adapter, tensor_problems)

    shapes = {name: tensor.shape for name, tensor in tensors.tensors.items()}
    base = read_base(facts.base_model, shapes, problems)
    assert base is not None
    memory, alignment, assumed = read_memory(
        facts.armt,
        dialect=facts.dialect,
        base=base,
        shapes=shapes,
        bare=facts.bare,
        problems=problems,
    )
    decoder = base.decoder | {"learned_positions": position_rows(base, memory)}
    check_limits(decoder, memory, alignment, problems, window=base.window)
    problems.raise_if_any(GIVE + ", or correct it.")

    head = _has_own_head(tensors, naming, tied=base.tied)
    slots = list(all_slots(decoder, memory, biases=base.biases, head=head))
    plans = make_plans(slots, tensors, naming, decoder, tensor_problems)
    tensor_problems.raise_if_any(
        f"What is expected follows from {facts.where}: correct that if it belongs to another model;"
        " otherwise the weight file is damaged, incomplete or of another kind."
    )
    folder = weights.parent
    return Checkpoint(
        path=path,
        folder=folder,
        origin=_origin(weights, hub=hub),
        decoder=decoder,
        memory=memory,
        segment_alignment=alignment,
        source_dtype="float32" if merged else common_dtype(plans),
        plans=plans,
        biases=base.biases,
        generation=generation_of(_token_ids(facts, folder), overrides, decoder["vocab_size"]),
        tokenizer=_tokenizer(folder, path if path.is_dir() else path.parent),
        assumed=tuple(assumed),
        merged_lora=merged,
    )


def _all_tensors(weights: Path, *, layers: int) -> list[Stored]:
    """Refuses absurd numbers of tensors before work is spent on each."""
    most = MOST_TENSORS_PER_LAYER * (layers + 1)
    stored = list(itertools.islice(open_weights(weights), most + 1))
    if len(stored) > most:
        raise CheckpointError(
            f"{weights}: found more than {most} tensors, expected far fewer for {layers} layers"
        )
    return stored


def _merge_lora(
    tensors: dict[str, Stored],
    naming: Naming,
    facts: Facts,
    adapter: Path | None,
    problems: Problems,
) -> bool:
    fields = Fields("lora", facts.lora, {"use_rslora": False}, problems)
    alpha = fields.number("lora_alpha") if fields.given("lora_alpha") else None
    merged = merge_inside(
        tensors,
        naming,
        alpha=alpha,
        use_rslora=fields.flag("use_rslora"),
        problems=problems,
    )
    if adapter is not None:
        merged = merge_folder(tensors, naming, adapter, problems) or merged
    return merged


def _has_own_head(tensors: Sorted, naming: Naming, *, tied: bool) -> bool:
    """Whether the output embedding is stored and is not the input embedding once more."""
    name = f"base.{naming.family.outer_modules['head']}.weight"
    head = tensors.tensors.get(name)
    embedding = tensors.tensors.get(f"base.{naming.family.outer_modules['embedding']}.weight")
    if head is not None and embedding is not None and tied and identical(head, embedding):
        del tensors.tensors[name]
        return False
    return head is not None


def _origin(weights: Path, *, hub: bool) -> str:
    kind = "Hugging Face folder" if hub else "official state dict"
    form = "in shards" if weights.name.endswith(".index.json") else weights.suffix.lstrip(".")
    return f"{kind} ({form})"


def _token_ids(facts: Facts, folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return {**facts.token_ids, **(token_ids_of(read_json(path)) if path.is_file() else {})}


def _tokenizer(*folders: Path) -> Path | None:
    found = (folder / "tokenizer.json" for folder in folders)
    return next((path for path in found if path.is_file()), None)
