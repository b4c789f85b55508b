"""The lm-evaluation-harness on the engine: its answers are the engine's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import armt
from armt.demo.grammar import PLACES
from armt.models import resolve
from armt.tasks.babi import Item, generate_many, make_sentences

lm_eval = pytest.importorskip("lm_eval", reason='needs the extra "lm-eval"')
pytest.importorskip("tokenizers", reason='needs the extra "text"')

from armt.clients.lm_eval import ArmtLM, score  # noqa: E402


@pytest.fixture(scope="module")
def model() -> ArmtLM:
    return ArmtLM("demo", device="cpu")


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logprobs(logits: Any) -> Any:
    rows = np.asarray(logits, np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def text(problem: Item, seed: int = 0) -> str:
    """Facts with prose between them, and the prompt."""
    prose = make_sentences(200, seed)
    parts = [
        " ".join([fact, *prose[9 * i : 9 * i + 9]]) for i, fact in enumerate(problem.sentences)
    ]
    return " ".join(parts) + f" {problem.question}<gen>"


PROBLEMS = generate_many("qa1", 12, seed=4)


def test_loglikelihood_is_that_of_the_whole_sequence(model: ArmtLM) -> None:
    context = text(PROBLEMS[0])
    requests = [request(context, " " + place) for place in PLACES]
    results = model.loglikelihood(requests, disable_tqdm=True)
    ids = model.tokenizer.encode(context)
    assert len(ids) > model.engine.segment_size
    logits = model.engine.forward(ids).logits
    assert logits is not None
    for place, (found, greedy) in zip(PLACES, results, strict=True):
        (token,) = model.tokenizer.encode(f"{context} {place}")[len(ids) :]
        assert found == pytest.approx(logprobs(logits[0, -1])[token], abs=1e-4)
        assert greedy == (place == PROBLEMS[0].answer) == (int(logits[0, -1].argmax()) == token)


def test_a_long_continuation(model: ArmtLM) -> None:
    ids = model.tokenizer.encode(" ".join(make_sentences(80, seed=5)))
    assert len(ids) > 2 * model.engine.segment_size
    with model.engine.session() as session, model.engine.session() as other:
        session.feed(ids[:100])
        other.feed(ids[:100])
        before = session.state.to_bytes()
        total, greedy = score(session, ids[100:])
        assert session.state.to_bytes() == before
        assert total == pytest.approx(other.score(ids[100:]).sum(), abs=1e-6 * len(ids))
        assert not greedy


def test_spaces_between_belong_to_the_continuation(model: ArmtLM) -> None:
    (a, b) = model.loglikelihood([request("It was late. ", "He"), request("It was late.", " He")])
    assert a == b


def test_rolling_is_one_pass_over_everything(model: ArmtLM) -> None:
    long = " ".join(make_sentences(120, seed=6))
    (found,) = model.loglikelihood_rolling([request(long)], disable_tqdm=True)
    ids = np.concatenate([[0], model.tokenizer.encode(long)])  # 0: end of text, the start token
    assert len(ids) > 3 * model.engine.segment_size
    logits = model.engine.forward(ids).logits
    assert logits is not None
    rows = logprobs(logits[0, :-1])
    assert found == pytest.approx(rows[np.arange(len(ids) - 1), ids[1:]].sum(), rel=1e-6)


def test_generation_stops_where_it_is_told(model: ArmtLM) -> None:
    context = text(PROBLEMS[1])
    free, cut = model.generate_until(
        [
            request(context, {"until": ["\n\n"], "max_gen_toks": 8}),
            request(context, {"until": PROBLEMS[1].answer[2:4], "max_gen_toks": 8}),
        ],
        disable_tqdm=True,
    )
    assert free.strip() == PROBLEMS[1].answer
    assert cut.strip() == PROBLEMS[1].answer[:2]


def test_the_harness_runs_a_task_of_its_own(model: ArmtLM, tmp_path: Path) -> None:
    lines = [
        {"text": text(p, seed), "answer": p.answer, "places": PLACES}
        for seed, p in enumerate(PROBLEMS)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": " ",
    }
    choice = common | {
        "task": "armt_places",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{places}}",
        "doc_to_target": "{{places.index(answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answer = common | {
        "task": "armt_answers",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [
            {
                "name": "stripped",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model=model, tasks=[choice, answer], bootstrap_iters=0, log_samples=True
    )
    right = [ask(model.engine, model, line) for line in lines]
    assert sum(right) >= 9
    assert found["results"]["armt_places"]["acc,none"] == pytest.approx(np.mean(right))
    assert found["results"]["armt_answers"]["exact_match,stripped"] == pytest.approx(np.mean(right))


def ask(engine: armt.Engine, model: ArmtLM, line: dict[str, Any]) -> bool:
    """The engine's own answer."""
    with engine.session() as session:
        session.feed(model.tokenizer.encode(line["text"]))
        ids = [t for t in session.generate(8, stop_ids=0) if t]
    return model.tokenizer.decode(ids).strip() == line["answer"]


def test_by_name_and_with_the_harness_own_arguments() -> None:
    from lm_eval.api.registry import get_model

    made = get_model("armt").create_from_arg_string(
        "pretrained=demo,threads=1", {"batch_size": "auto", "device": "cpu"}
    )
    assert isinstance(made, ArmtLM) and made.engine.device == "cpu"
    assert made.engine.checkpoint.path == resolve("demo")
    with pytest.raises(armt.InvalidArgument, match="model"):
        ArmtLM()
