"""What clients may send, in OpenAI's words: all of it bounded, and what is not supported refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from .generation import Sampling

PROMPTS, TEXTS, MESSAGES, STOPS, TOP = 16, 256, 256, 4, 20
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # of a prefix, or of the base, which may hold dots


def _unique(stops: list[str]) -> list[str]:
    return list(dict.fromkeys(stops))


ModelName = Annotated[str, StringConstraints(pattern=NAME)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=STOPS), AfterValidator(_unique)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Generating(_Strict):
    """What completions and chat share. Fields that OpenAI's clients send and this server does not act on may only
    hold the value that changes nothing."""

    model: ModelName
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    user: str | None = None

    def sampling(self, max_tokens: int, top: int | None) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, tuple(stop), top)


class CompletionRequest(_Generating):
    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=PROMPTS)]
    logprobs: int | None = Field(default=None, ge=0, le=TOP)
    echo: Literal[False] = False
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def tokens(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one, as texts or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MESSAGES)]
    name: str | None = None

    def flat(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generating):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)

    @property
    def tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 64

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ClassifyRequest(_Strict):
    """like: where `model` is the base, the prefix whose template and label words it is to answer with."""

    model: ModelName
    input: str | Annotated[list[str], Field(min_length=1, max_length=TEXTS)]
    like: ModelName | None = None

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class AttentionRequest(_Strict):
    """input: a text, or the messages of a chat. Around a text for a prefix that classifies its template is put; for
    others it is read as the prompt of a completion."""

    model: ModelName
    input: str | Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How every error is told."""

    error: ErrorDetail


class Label(BaseModel):
    """One text's label. `cut` says that the text was too long to be read whole."""

    index: int
    label: str
    probability: float
    probabilities: dict[str, float]
    cut: bool


class ClassifyAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Label]


class TokenShare(BaseModel):
    """A token's text, and the share of its attention that goes to the prefix, between 0 and 1."""

    token: str
    share: float


class AttentionAnswer(BaseModel):
    """share: the mean over the tokens. cut: the text was too long to be read whole."""

    id: str
    object: Literal["attention"] = "attention"
    created: int
    model: str
    share: float
    tokens: list[TokenShare]
    cut: bool


class PrefixState(BaseModel):
    """A prefix of the folder: in memory or not, or why it is not served."""

    name: str
    length: int | None = None
    labels: list[str] | None = None
    resident: bool = False
    damaged: bool = False


class PrefixList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PrefixState]


class About(BaseModel):
    """A prefix as a client needs to know it. `length` in tokens; `parameters` that were trained.

    task: what it was trained for (null: for nothing in particular); `template` stands around its texts, named in
    braces. fields, labels: of one that classifies; zero_shot: the base can answer like it. max_new_tokens: of one that
    generates.
    """

    task: str | None
    form: str
    length: int
    parameters: int
    fields: list[str] | None
    labels: list[str] | None
    multi_label: bool
    zero_shot: bool
    template: str | None
    max_new_tokens: int | None


class ModelCard(BaseModel):
    """routes: those that answer for it. parameters: the base's; what a prefix adds is in `prefix`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["foreword"] = "foreword"
    parent: str | None = None
    routes: list[str]
    parameters: int
    prefix: About | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "stopping"]


class Done(BaseModel):
    """What a change at run time left: the prefix, and whether it is served now."""

    name: str
    served: bool


Answer = dict[str, Any]
