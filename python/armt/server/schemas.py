"""Request bodies: what may stand in them, checked before anything runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from armt.server.errors import ApiError
from armt.server.model import check_text
from armt.session import Sampling

MOST_STOPS = 16
LONGEST_STOP = 1024
MOST_TOP = 20
LARGEST_SEED = 2**63 - 1

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Prompt = Annotated[
    Any,
    Field(
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SamplingFields(Body):
    """How tokens are chosen, and where an answer ends."""

    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        found = [stop] if isinstance(stop, str) else stop or []
        if len(found) > MOST_STOPS or any(not 0 < len(part) <= LONGEST_STOP for part in found):
            raise ValueError(
                f"expected at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
            )
        return stop

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(check_text(part, "stop") for part in found)

    def sampling(self) -> Sampling:
        """For the engine; ApiError for what it refuses."""
        sampling = Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )
        sampling.compiled()
        return sampling


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class OpenAIFields(SamplingFields):
    """What completions and chat completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @field_validator("temperature", "top_p", mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        return 1.0 if value is None else value

    def refuse_unsupported(self) -> None:
        """ApiError for settings that would change the answer and that we do not have."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise unsupported(name, "use repetition_penalty")
        if self.logit_bias:
            raise unsupported("logit_bias")


class CompletionBody(OpenAIFields):
    """Of POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        """See OpenAIFields."""
        super().refuse_unsupported()
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "it must equal n")
        if self.suffix:
            raise unsupported("suffix")


class ContentPart(Body):
    """A piece of a message; text only."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=1024)]
    name: Ignored = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": check_text(text, "messages")}


class ResponseFormat(Body):
    """Text only."""

    type: Literal["text"]


class ChatBody(OpenAIFields):
    """Of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Ignored = None

    def refuse_unsupported(self) -> None:
        """See OpenAIFields."""
        super().refuse_unsupported()
        if self.tools:
            raise unsupported("tools")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                "invalid_request", "top_logprobs: needs logprobs=true", param="top_logprobs"
            )


class LlamaBody(BaseModel):
    """Of POST /completion, as llama.cpp's server takes it; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Prompt
    n_predict: Annotated[int, Field(ge=-1)] = -1
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 40
    top_p: Probability = 0.95
    min_p: Probability = 0.05
    repeat_penalty: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-1, le=LARGEST_SEED)] = -1
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool = False
    n_probs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    grammar: str | None = None
    json_schema: Any = None

    def sampling_fields(self) -> SamplingFields:
        """The same in our own words; ApiError for what we do not have."""
        for name in ("grammar", "json_schema"):
            if getattr(self, name):
                raise unsupported(name)
        return SamplingFields(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            seed=None if self.seed == -1 else self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            stream=self.stream,
        )


class NewSession(Body):
    """Of POST /v1/sessions."""

    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None


class FeedBody(Body):
    """Of POST /v1/sessions/{session_id}/feed when it is JSON: one of the two."""

    text: str | None = None
    tokens: Annotated[Any, Field(json_schema_extra={"type": "array"})] = None


class AskBody(SamplingFields):
    """Of POST /v1/sessions/{session_id}/ask: at most one of question, prompt, tokens."""

    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 0.0
    question: str | None = None
    prompt: str | None = None
    tokens: Annotated[Any, Field(json_schema_extra={"type": "array"})] = None
    max_tokens: Annotated[int, Field(ge=1)] = 20
    write: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None


def unsupported(name: str, hint: str = "leave it out") -> ApiError:
    """A setting of the original service that is not here."""
    return ApiError("unsupported", f"{name}: not supported; {hint}", param=name)
