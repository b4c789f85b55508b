"""Streaming text: pieces give the ids of the whole, and whole characters."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import armt
from armt import text as armt_text
from armt.text import StreamDecoder, TextSettings, Tokenizer, collapse_white_space, open_text

tokenizers = pytest.importorskip("tokenizers", reason='needs the extra "text"')

SAMPLE = (
    "The captain's boat, which had been waiting, wasn't there;  and it's 1869!\n\nSo he went on. "
    "été Straße 東京は夜の七時。 нет 🙂👩‍🚀 12345 a_b_c(x)\n\treturn x;\r\n"
) * 8
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("embedded", "bytes", "split", "metaspace", "no_pretokenizer", "words")


def _byte_level(pre: Any) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "<two words>"]
    )
    backend.train_from_iterator([SAMPLE], trainer)
    return backend


def _sentencepiece(pre: Any) -> Any:
    """Byte fallback and the mark of a space, with or without a pre-tokenizer (Llama 2, Mistral)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=400))
    learned = json.loads(learner.to_str())["model"]
    names = ["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate([*names, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if pre is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return backend


def _backend(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    if kind == "embedded":
        return Backend.from_file(str(EMBEDDED))
    if kind == "bytes":
        return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    if kind == "split":
        parts = [
            pre_tokenizers.Split(Regex(GPT4), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        backend = _byte_level(pre_tokenizers.Sequence(parts))
        backend.post_processor = TemplateProcessing(
            single="<s> $A <s>", special_tokens=[("<s>", 0)]
        )
        return backend
    if kind == "words":  # tokens of several words: byte-level, cut at line ends only
        return _byte_level(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        )
    pre = pre_tokenizers.Metaspace(prepend_scheme="first") if kind == "metaspace" else None
    return _sentencepiece(pre)


EMBEDDED = Path(armt.__file__).parent / "models" / "babilong" / "tokenizer.json"


@cache
def tokenizer(kind: str) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        _backend(kind).save(str(path))
        return Tokenizer(folder)


def cut_up(text: str, cuts: list[int]) -> Iterator[str]:
    """``text`` cut at any positions."""
    edges = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    yield from (text[a:b] for a, b in itertools.pairwise(edges))


WORDS = st.sampled_from(
    [
        *SAMPLE.split(),
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "<eos>",
        "<two words>",
        "<s>",
        "e\u0301",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(WORDS, max_size=60).map(" ".join),
    st.lists(WORDS, max_size=60).map("".join),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=8), chunk=st.integers(1, 40))
@example(text="one <two words> two words> <two words>", cuts=[7, 9], chunk=5)
@example(text="end.\n\n\nNext  one.\n   indented\nflush", cuts=[], chunk=3)
def test_pieces_give_the_ids_of_the_whole(
    kind: str, text: str, cuts: list[int], chunk: int
) -> None:
    coder = tokenizer(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(armt_text, "CHUNK", chunk)  # small, so that short texts are cut often
        for specials in (False, True):
            found = [*coder.encode_stream(cut_up(text, cuts), specials=specials)]
            whole = coder.encode(text, specials=specials).tolist()
            assert [i for part in found for i in part.tolist()] == whole


def test_the_stream_really_is_cut() -> None:
    parts = [len(part) for part in tokenizer("split").encode_stream(SAMPLE * 200)]
    assert len(parts) > 3 and max(parts) < armt_text.CHUNK


def test_tokens_of_several_words_are_noticed() -> None:
    assert tokenizer("words")._only_lines
    assert not any(tokenizer(kind)._only_lines for kind in KINDS if kind != "words")


def test_a_run_without_white_space_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(armt_text, "CHUNK", 64)
    monkeypatch.setattr(armt_text, "LONGEST_RUN", 256)
    parts = [*tokenizer("bytes").encode_stream("x" * 5000)]
    assert max(map(len, parts)) <= 320
    assert "".join(tokenizer("bytes").decode_stream(np.concatenate(parts))).strip() == "x" * 5000


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
@example(text="東京は夜の七時。" * 12)
@example(text="🙂👩‍🚀" * 12)
def test_decoding_never_breaks_a_character(kind: str, text: str) -> None:
    coder = tokenizer(kind)
    ids = coder.encode(text).tolist()
    whole = coder.decode(ids, specials=True)
    parts = [*coder.decode_stream(ids, specials=True)]
    assert "".join(parts) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@settings(deadline=None)
@given(ids=st.lists(st.integers(2, 257), max_size=120))
def test_decoding_any_bytes_ends_and_stays_bounded(kind: str, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer(kind))
    for token in ids:
        decoder.feed(token)
        assert len(decoder._window) <= 2 * armt_text.WINDOW
    decoder.finish()


def test_words_come_early() -> None:
    coder = tokenizer("embedded")
    ids = coder.encode(" Mary moved to the kitchen.").tolist()
    decoder = StreamDecoder(coder)
    assert [decoder.feed(token) for token in ids][:3] == [" Mary", " moved", " to"]


def test_files_are_utf8_with_any_line_ends() -> None:
    with open_text(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9")) as text:
        assert text.read() == "one\ntwo é"


def test_bytes_that_are_no_text() -> None:
    with (
        pytest.raises(armt.InvalidArgument, match=r"found the byte 0xff.*expected UTF-8"),
        open_text(io.BytesIO(b"one \xff two")) as text,
    ):
        list(tokenizer("embedded").encode_stream(text))


@settings(deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=8))
def test_white_space_collapses(text: str, cuts: list[int]) -> None:
    words = " ".join(text.split())
    before = " " if words and text[0].isspace() else ""
    assert "".join(collapse_white_space(cut_up(text, cuts))) == before + words


def test_settings_of_a_model(tmp_path: Path) -> None:
    assert TextSettings.of(tmp_path) == TextSettings()
    found = TextSettings.of(EMBEDDED.parent)
    assert found.prompt("Who {x}?") == " Who {x}?<gen>"
    assert [*found.prepared(["a\n", "b"])] == ["a", " b"]
    (tmp_path / "config.json").write_text('{"text": {"prompt_format": "no place", "other": 1}}')
    with pytest.raises(armt.InvalidArgument, match=r'contains "\{question\}"'):
        TextSettings.of(tmp_path)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(armt.InvalidArgument, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(armt.InvalidArgument, match=r"no valid tokenizer\.json"):
        Tokenizer(tmp_path)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(armt.InvalidArgument, match=r'pip install "armt\[text\]"'):
        Tokenizer(EMBEDDED)
