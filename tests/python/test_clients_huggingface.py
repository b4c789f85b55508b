"""The face in the style of Hugging Face: what it gives is what the engine gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.clients.huggingface import ArmtForCausalLM
from armt.tasks.babi import generate_many, make_sentences

pytest.importorskip("tokenizers", reason='needs the extra "text"')


@pytest.fixture(scope="module")
def model() -> ArmtForCausalLM:
    return ArmtForCausalLM.from_pretrained(
        "demo", device_map="cpu", trust_remote_code=True, attn_implementation="flash_attention_2"
    ).eval()


def prompt(model: ArmtForCausalLM, seed: int = 1) -> tuple[Any, str]:
    from armt.text import Tokenizer

    (problem,) = generate_many("qa1", 1, seed)
    prose = make_sentences(60, seed)
    text = " ".join([*problem.sentences[:2], *prose, *problem.sentences[2:]])
    tokenizer = Tokenizer(model.engine.checkpoint.folder)
    return tokenizer.encode(f" {text} {problem.question}<gen>"), problem.answer


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.seen.append(np.asarray(value).reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True


def test_generate_returns_the_prompt_and_new_tokens(model: ArmtForCausalLM) -> None:
    ids, answer = prompt(model)
    found = model.generate(ids[None], max_new_tokens=4)
    assert found.shape[1] > len(ids) > model.config.segment_size
    np.testing.assert_array_equal(found[0, : len(ids)], ids)
    with model.engine.session() as session:
        session.feed(ids)
        own = list(session.generate(4, stop_ids=0))
    assert found[0, len(ids) :].tolist() == own
    from armt.text import Tokenizer

    decoded = Tokenizer(model.engine.checkpoint.folder).decode(found[0, len(ids) :])
    assert decoded.strip() == answer


def test_a_streamer_sees_the_same(model: ArmtForCausalLM) -> None:
    ids, _ = prompt(model, seed=2)
    streamer = Streamer()
    found = model.generate(ids[None], max_new_tokens=6, eos_token_id=[], streamer=streamer)
    assert streamer.seen[0] == ids.tolist() and streamer.ended
    assert [t for part in streamer.seen[1:] for t in part] == found[0, len(ids) :].tolist()
    plain = model.generate(ids[None], max_new_tokens=6, eos_token_id=[])
    np.testing.assert_array_equal(found, plain)
    with pytest.raises(armt.InvalidArgument, match="one"):
        model.generate(np.stack([ids, ids]), streamer=streamer)


def test_rows_with_padding(model: ArmtForCausalLM) -> None:
    (a, _), (b, _) = prompt(model, seed=3), prompt(model, seed=4)
    width = max(len(a), len(b))
    ids, mask = np.full((2, width), 2), np.zeros((2, width), int)
    for row, one in enumerate((a, b)):
        ids[row, width - len(one) :] = one
        mask[row, width - len(one) :] = 1
    found = model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=[])
    for row, one in enumerate((a, b)):
        alone = model.generate(one[None], max_new_tokens=3, eos_token_id=[])
        assert found[row, width:].tolist() == alone[0, len(one) :].tolist()


def test_lengths_and_sampling(model: ArmtForCausalLM) -> None:
    ids, _ = prompt(model)
    n = len(ids)
    assert model.generate(ids, max_length=n + 2, eos_token_id=[]).shape == (1, n + 2)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 8.0, "max_new_tokens": 8}
    a, b, c = (model.generate(ids, seed=seed, eos_token_id=[], **settings) for seed in (1, 1, 2))
    assert (a == b).all() and not (a == c).all()
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    assert model.generate(ids, max_new_tokens=1, **greedy).shape == (1, n + 1)


@pytest.mark.parametrize("wrong", [{"num_beams": 4}, {"bad_words_ids": [[1]]}, {"penalty": 2}])
def test_what_would_change_the_answer_is_refused(
    model: ArmtForCausalLM, wrong: dict[str, Any]
) -> None:
    with pytest.raises(armt.InvalidArgument, match=next(iter(wrong))):
        model.generate(prompt(model)[0], **wrong)


def test_config(model: ArmtForCausalLM) -> None:
    assert model.device == "cpu" and model.config.vocab_size == 4096
    assert model.config.eos_token_id == 0 and model.generation_config.pad_token_id == 2
    assert model.config.num_hidden_layers == 8 and model.config.segment_size == 256
    assert model.name_or_path == "demo" and model.to("cuda") is model


def test_logits(model: ArmtForCausalLM) -> None:
    ids, _ = prompt(model)
    expected = model.engine.forward(ids).logits
    np.testing.assert_array_equal(model(ids).logits, expected)


def test_tensors_of_torch(model: ArmtForCausalLM) -> None:
    torch = pytest.importorskip("torch", reason='needs the extra "torch"')
    ids, _ = prompt(model)
    given = torch.tensor(ids.astype(np.int64))[None]
    found = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=2)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int64
    assert found.tolist() == model.generate(ids[None], max_new_tokens=2).tolist()
    assert isinstance(model(given).logits, torch.Tensor)
    half = ArmtForCausalLM.from_pretrained("demo", device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert half.engine.dtype == "bfloat16"


def test_an_evaluation_loop_with_the_library_s_tokenizer(model: ArmtForCausalLM) -> None:
    """The steps of BABILong's published script: tokenise, generate, cut the prompt off, decode."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    pytest.importorskip("torch", reason='needs the extra "torch"')
    path = str(model.engine.checkpoint.folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    settings = {"max_new_tokens": 15, "max_length": None, "num_beams": 1, "do_sample": False}
    settings |= {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 2}
    right = 0
    problems = generate_many("qa1", 10, seed=8)
    for seed, problem in enumerate(problems):
        prose = make_sentences(60, seed)
        text = " ".join([*problem.sentences, *prose, f"{problem.question}<gen>"])
        inputs = tokenizer(" " + text, return_tensors="pt", add_special_tokens=True)
        inputs = inputs.to(model.device)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, **settings)
        output = output[0][inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(output, skip_special_tokens=True).strip() == problem.answer
    assert right >= 6


def test_the_library_s_streamer(model: ArmtForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    pytest.importorskip("torch", reason='needs the extra "torch"')
    ids, answer = prompt(model)
    path = str(model.engine.checkpoint.folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, max_new_tokens=4, streamer=streamer)
    assert answer in capsys.readouterr().out


SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, data = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
model = AutoModelForCausalLM.from_pretrained(
    folder,
    trust_remote_code=True,
    device_map="auto",
    torch_dtype=torch.bfloat16,
    attn_implementation="flash_attention_2",
)
model = model.eval()
for line in open(data):
    sample = json.loads(line)
    ids = tokenizer(sample["text"], return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        output = model.generate(input_ids=ids, max_new_tokens=15, num_beams=1, do_sample=False)
    output = tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True).strip()
    print(output, output == sample["answer"])
"""


def test_a_script_for_the_library_runs_unchanged(model: ArmtForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the package transformers")
    pytest.importorskip("torch", reason='needs the extra "torch"')
    (tmp_path / "script.py").write_text(SCRIPT)
    with (tmp_path / "data.jsonl").open("w") as file:
        for seed, problem in enumerate(generate_many("qa1", 8, seed=9)):
            text = " ".join([*problem.sentences, *make_sentences(50, seed), problem.question])
            file.write(json.dumps({"text": f" {text}<gen>", "answer": problem.answer}) + "\n")
    tool = [sys.executable, "-m", "armt.clients.huggingface"]
    script = [tmp_path / "script.py", model.engine.checkpoint.folder, tmp_path / "data.jsonl"]
    done = subprocess.run([*tool, *map(str, script)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 8 and done.stdout.count(" True") >= 6
    usage = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert usage.returncode == 1 and "SCRIPT.py" in usage.stderr
