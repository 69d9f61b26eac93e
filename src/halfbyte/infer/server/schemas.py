"""What clients may ask, as pydantic models: OpenAI's names, and the sampling parameters that OpenAI does not have.

A field that is not known is refused and not ignored: `max_token` would otherwise write sixteen tokens without a word.
What OpenAI offers and this server does not is named here as well, so that it is refused by its own name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from halfbyte.errors import nearest
from halfbyte.infer.sampling import SamplingParams


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class Part(BaseModel):
    """A piece of a message's content; only text is offered."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    name: Text | None = None

    def rendered(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Said by clients for the server's own records; nothing here depends on them.
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    # Offered by OpenAI, and not here.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            raise ValueError(f"there is no parameter {unknown[0]!r}; {nearest(unknown[0], cls.model_fields)}")
        return data

    def sampling(self, most: int, logprobs: int | None, index: int) -> SamplingParams:
        """The parameters with OpenAI's defaults; each of several answers has a seed of its own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        return SamplingParams(
            max_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            stop=stop,
            seed=None if self.seed is None else self.seed + index,
            logprobs=logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[Ids], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, however they were given."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first: Any = self.prompt[0]
        whole: Any = self.prompt
        return [whole] if isinstance(first, int) else list(whole)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field()] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is none."""

    error: ErrorDetail
