"""A model for EleutherAI's lm-evaluation-harness (``pip install "armt[lm-eval]"``).

From Python, give :class:`ArmtLM` to ``lm_eval.simple_evaluate(model=...)``. From the command line::

    python -m armt.clients.lm_eval --model armt --model_args model=demo --tasks my_task

which is the harness's own command line with the model ``armt`` added. Contexts of any length are
read whole; nothing is ever cut off on the left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.errors import InvalidArgument
from armt.models import resolve
from armt.session import Session
from armt.tasks.reading import SEGMENTS_A_CALL, blocks, read_all
from armt.text import Tokenizer

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        'the lm-evaluation-harness is not installed: run pip install "armt[lm-eval]"'
    ) from error

Ids: TypeAlias = npt.NDArray[np.int32]
BATCH = 8
"""Contexts read side by side unless ``batch_size`` says otherwise."""


@register_model("armt")
class ArmtLM(LM):
    """``model`` is a checkpoint path, a name such as "demo", or an :class:`armt.Engine`."""

    def __init__(
        self,
        model: str | Engine | None = None,
        *,
        pretrained: str | Engine | None = None,
        device: str | None = None,
        dtype: str = "auto",
        threads: int = 0,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        **overrides: Any,
    ) -> None:
        super().__init__()
        source = model if model is not None else pretrained
        if source is None:
            raise InvalidArgument("model: found nothing, expected a checkpoint's path or name")
        self.engine = (
            source
            if isinstance(source, Engine)
            else Engine.from_pretrained(
                resolve(str(source)),
                device=device or "auto",
                dtype=dtype,  # type: ignore[arg-type]  # checked there
                threads=int(threads),
                **overrides,
            )
        )
        checkpoint = self.engine.checkpoint
        self.tokenizer = Tokenizer(tokenizer or checkpoint.tokenizer or checkpoint.folder)
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = BATCH if batch_size in (None, "auto") else int(str(batch_size))

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of different tokenizers apart."""
        return str(self.tokenizer.path)

    # ------------------------------------------------------------- the harness

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each (context,
        continuation). A context that several continuations share is read once."""
        pairs = [self._pair(*request.args) for request in requests]
        groups: dict[bytes, list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            groups.setdefault(context.tobytes(), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        members = list(groups.values())
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood")
        for first in range(0, len(members), self.batch_size):
            part = members[first : first + self.batch_size]
            contexts = [pairs[group[0]][0] for group in part]
            sessions = read_all(self.engine, [self._blocks(ids) for ids in contexts])
            for session, group in zip(sessions, part, strict=True):
                for index in group:
                    results[index] = score(session, pairs[index][1])
                    self._cache("loglikelihood", requests[index], results[index])
                    bar.update()
                session.close()
        bar.close()
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text behind the start token, in one streaming pass."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            total = 0.0
            with self.engine.session() as session:
                session.feed(self._start())
                stream = self.tokenizer.encode_stream(text)
                for ids in blocks(stream, SEGMENTS_A_CALL * self.engine.segment_size):
                    total += float(session.score(ids).sum())
            results.append(total)
            self._cache("loglikelihood_rolling", request, total)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to one of its stop texts, the end of text, or the limit."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, settings = request.args
            results.append(self._continue(context, dict(settings)))
            self._cache("generate_until", request, results[-1])
        return results

    # ----------------------------------------------------------------- parts

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        limit = int(settings.pop("max_gen_toks", self.max_gen_toks))
        sampled = bool(settings.pop("do_sample", False))
        temperature = settings.pop("temperature", None)
        known = ("top_k", "top_p", "min_p")
        sampling = {name: settings[name] for name in known if name in settings}
        eos = self.engine.checkpoint.eos_token_ids
        text = ""
        (session,) = read_all(self.engine, [self._blocks(self._context(context))])
        with session:
            generation = session.generate(
                limit,
                temperature=float(1.0 if temperature is None else temperature) if sampled else 0.0,
                stop_ids=eos,
                **(sampling if sampled else {}),
            )
            tokens = (token for token in generation if token not in eos)
            for piece in self.tokenizer.decode_stream(tokens):
                text += piece
                if any(stop in text for stop in stops):
                    break
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))]

    def _start(self) -> Ids:
        """The tokens that stand for the beginning of a text."""
        if len(start := self.tokenizer.start_ids):
            return start
        facts = self.engine.checkpoint.generation
        known = [facts.get("bos_token_id"), *self.engine.checkpoint.eos_token_ids]
        first = next((token for token in known if token is not None), None)
        if first is None:
            raise InvalidArgument(
                "an empty context: the model has neither a start nor an end token to put before it;"
                " give eos_token_id="
            )
        return np.array([first], np.int32)

    def _context(self, text: str) -> Ids:
        if not text:
            return self._start()
        return np.concatenate([self.tokenizer.start_ids, self.tokenizer.encode(text)])

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of both; spaces between them belong to the continuation, as in training."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return self._start(), self.tokenizer.encode(continuation)
        before = self._context(context)
        return before, self._context(context + continuation)[len(before) :]

    def _blocks(self, ids: Ids) -> Iterator[Ids]:
        return blocks(iter([ids]), SEGMENTS_A_CALL * self.engine.segment_size)

    def _cache(self, name: str, request: Any, result: Any) -> None:
        self.cache_hook.add_partial(name, request.args, result)


def score(session: Session, ids: Ids) -> tuple[float, bool]:
    """(log-likelihood, whether greedy decoding gives it) of ``ids`` after what ``session`` has
    read; the session is left as it is."""
    total, greedy = 0.0, True
    with session.fork() as branch:
        before = branch.logits
        for block in blocks(iter([ids]), branch.engine.segment_size):
            after = branch.feed(block, logits="all").logits
            assert after is not None
            rows = np.concatenate([before[None], after[:-1]]).astype(np.float64)
            largest = rows.max(axis=1)
            chosen = rows[np.arange(len(block)), block] - largest
            total += float((chosen - np.log(np.exp(rows - largest[:, None]).sum(axis=1))).sum())
            greedy = greedy and bool((rows.argmax(axis=1) == block).all())
            before = after[-1]
    return total, greedy


def main() -> None:
    """The harness's command line, with the model ``armt``."""
    from lm_eval.__main__ import cli_evaluate

    if not any(argument.split("=")[0] == "--device" for argument in sys.argv):
        sys.argv += ["--device", "auto"]  # the harness would ask for cuda:0
    cli_evaluate()


if __name__ == "__main__":
    main()
