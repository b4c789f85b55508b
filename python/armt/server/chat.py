"""Chat messages as one prompt: the model's own template, or a plain form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from armt.errors import CheckpointError
from armt.server.errors import ApiError

LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template from the model's folder, run in a sandbox; needs the package ``jinja2``."""

    source: str
    tokens: Mapping[str, str]
    """bos_token, eos_token ... as the template may use them."""

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint folder: chat_template.jinja or in tokenizer_config.json."""
        config = _tokenizer_config(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = _read(file) if file.is_file() else _named(config.get("chat_template"))
        if not source:
            return None
        tokens = {
            name: value["content"] if isinstance(value, dict) else str(value)
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        return cls(source, tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, the opening of the answer included; ApiError if the template refuses."""
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ApiError(
                "no_chat_template", 'the server lacks the package "jinja2" for chat templates'
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        try:
            return environment.from_string(self.source).render(
                messages=list(messages), add_generation_prompt=True, **self.tokens
            )
        except ApiError:
            raise
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise ApiError(
                "invalid_request",
                f"messages: the model's chat template cannot show them ({error})",
                param="messages",
            ) from error


def plain_form(messages: Sequence[Mapping[str, Any]], prompt_format: str) -> str:
    """For models without a template: earlier messages are a text, the last one is the question.

    Contents are joined by line ends, roles are left out; the last message, which must be the
    user's, is put into the model's ``prompt_format``.
    """
    *earlier, last = messages
    if last["role"] != "user":
        raise ApiError(
            "no_chat_template",
            "messages: the model has no chat template; in the plain form the last message must "
            f"be the user's, found {last['role']!r}",
            param="messages",
        )
    text = "\n".join(message["content"] for message in earlier)
    return text + prompt_format.replace("{question}", last["content"])


def _refuse(message: str) -> NoReturn:
    raise ApiError("invalid_request", f"messages: {message}", param="messages")


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: no valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _named(found: Any) -> str:
    """The default one where a folder has several."""
    if isinstance(found, list):
        named = {str(e["name"]): e["template"] for e in found if isinstance(e, dict)}
        found = named.get("default", "")
    return found if isinstance(found, str) else ""


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST_FILE:
        raise CheckpointError(f"{path}: found more than {LARGEST_FILE} bytes")
    return path.read_text(encoding="utf-8")
