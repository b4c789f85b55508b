"""The engine's tensors of a reference model, written out by hand for each base model, and the
comparison with those of a loaded checkpoint."""

from __future__ import annotations

import numpy as np

from armt.checkpoint import Checkpoint
from reference.arrays import Array
from reference.decoder import GPT2, Decoder, GPTNeoX, Llama
from reference.model import Model
from reference.safetensors import from_bfloat16_bits
from tolerances import EXACT, Tolerance, assert_close

Slots = dict[tuple[str, int], Array]


def stored_values(checkpoint: Checkpoint) -> Slots:
    """Everything that the engine would be given, as float64; types are checked."""
    found: Slots = {}
    for tensor in checkpoint.tensors():
        array = tensor.array
        assert (tensor.slot, tensor.layer) not in found
        assert array.ndim == 2 or tensor.dtype == "float32"
        if tensor.dtype == "bfloat16":
            assert array.dtype == np.uint16
            array = from_bfloat16_bits(np.ascontiguousarray(array))
        else:
            assert array.dtype == tensor.dtype
        found[tensor.slot, tensor.layer] = array.astype(np.float64)
    return found


def assert_reads(checkpoint: Checkpoint, model: Model, limit: Tolerance = EXACT) -> None:
    """The checkpoint gives the tensors of the model, no more and no less."""
    found, expected = stored_values(checkpoint), canonical_tensors(model)
    assert found.keys() == expected.keys()
    for slot, array in expected.items():
        assert_close(str(slot), found[slot], array, limit)


def canonical_tensors(model: Model) -> Slots:
    """(slot, layer) -> float64 values, [out, in] for matrices."""
    slots: Slots = {("memory", 0): model.memory}
    if model.sink is not None:
        slots["sink", 0] = model.sink
    for layer, maps in enumerate(model.maps):
        slots["mem_query", layer] = maps.query
        slots["mem_key", layer] = maps.key
        slots["mem_value", layer] = maps.value
        slots["mem_gate", layer] = maps.gate
        slots["mem_gate_bias", layer] = maps.gate_bias
    if isinstance(model.decoder, GPT2):
        return slots | _gpt2(model.decoder)
    if isinstance(model.decoder, GPTNeoX):
        return slots | _neox(model.decoder)
    assert isinstance(model.decoder, Llama)
    return slots | _llama(model.decoder)


def _gpt2(decoder: Decoder) -> Slots:
    w = decoder.weights
    slots = {
        ("embedding", 0): w["transformer.wte.weight"],
        ("positions", 0): w["transformer.wpe.weight"],
        ("final_norm", 0): w["transformer.ln_f.weight"],
        ("final_norm_bias", 0): w["transformer.ln_f.bias"],
    }
    for i in range(decoder.n_layers):
        at = f"transformer.h.{i}."
        slots["norm1", i], slots["norm1_bias", i] = w[at + "ln_1.weight"], w[at + "ln_1.bias"]
        slots["norm2", i], slots["norm2_bias", i] = w[at + "ln_2.weight"], w[at + "ln_2.bias"]
        for slot, name in (
            ("qkv", "attn.c_attn"),
            ("attn_out", "attn.c_proj"),
            ("mlp_up", "mlp.c_fc"),
            ("mlp_down", "mlp.c_proj"),
        ):
            slots[slot, i] = w[at + name + ".weight"].T
            slots[slot + "_bias", i] = w[at + name + ".bias"]
    return slots


def _llama(decoder: Decoder) -> Slots:
    w = decoder.weights
    slots = {
        ("embedding", 0): w["model.embed_tokens.weight"],
        ("final_norm", 0): w["model.norm.weight"],
    }
    if "lm_head.weight" in w:
        slots["head", 0] = w["lm_head.weight"]
    for i in range(decoder.n_layers):
        at = f"model.layers.{i}."
        slots["norm1", i] = w[at + "input_layernorm.weight"]
        slots["norm2", i] = w[at + "post_attention_layernorm.weight"]
        for kind, end in ((".weight", ""), (".bias", "_bias")):
            if at + "self_attn.q_proj" + kind in w:
                parts = [w[f"{at}self_attn.{x}_proj{kind}"] for x in "qkv"]
                slots["qkv" + end, i] = np.concatenate(parts)
            if at + "self_attn.o_proj" + kind in w:
                slots["attn_out" + end, i] = w[at + "self_attn.o_proj" + kind]
            if at + "mlp.up_proj" + kind in w:
                parts = [w[f"{at}mlp.{x}_proj{kind}"] for x in ("gate", "up")]
                slots["mlp_up" + end, i] = np.concatenate(parts)
                slots["mlp_down" + end, i] = w[at + "mlp.down_proj" + kind]
        for x in "qk":
            if f"{at}self_attn.{x}_norm.weight" in w:
                slots[f"{x}_norm", i] = w[f"{at}self_attn.{x}_norm.weight"]
    return slots


def _neox(decoder: GPTNeoX) -> Slots:
    w = decoder.weights
    slots = {
        ("embedding", 0): w["gpt_neox.embed_in.weight"],
        ("final_norm", 0): w["gpt_neox.final_layer_norm.weight"],
        ("final_norm_bias", 0): w["gpt_neox.final_layer_norm.bias"],
    }
    if "embed_out.weight" in w:
        slots["head", 0] = w["embed_out.weight"]
    c = decoder.head_width
    # Row r of the stored matrix is feature r % c of part (r // c) % 3 of head r // (3 c).
    order = [
        head * 3 * c + part * c + feature
        for part in range(3)
        for head in range(decoder.heads)
        for feature in range(c)
    ]
    for i in range(decoder.n_layers):
        at = f"gpt_neox.layers.{i}."
        for end, kind in (("", ".weight"), ("_bias", ".bias")):
            slots["qkv" + end, i] = w[at + "attention.query_key_value" + kind][order]
            for slot, name in (
                ("norm1", "input_layernorm"),
                ("norm2", "post_attention_layernorm"),
                ("attn_out", "attention.dense"),
                ("mlp_up", "mlp.dense_h_to_4h"),
                ("mlp_down", "mlp.dense_4h_to_h"),
            ):
                slots[slot + end, i] = w[at + name + kind]
    return slots
