"""What the answers and the streams of OpenAI's routes hold."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from kvik.server.answers import Answer
from kvik.server.cache.answers import OfCache, SessionTurn


class PromptTokenDetails(Answer, frozen=True, kw_only=True):
    """Tokens of the prompt that were read back instead of computed, and those that were left for others to read."""

    cached_tokens: int
    cache_write_tokens: int
    cache_write_tokens_details: dict[str, int] | UnsetType = UNSET  # by breakpoints' ttl


class OutputTokenDetails(Answer, frozen=True, kw_only=True):
    """Tokens that were thoughts."""

    reasoning_tokens: int


class ChatUsage(Answer, frozen=True, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails
    completion_tokens_details: OutputTokenDetails


class Timings(Answer, frozen=True, kw_only=True):
    """llama.cpp's, of all completions together: tokens and milliseconds in the cache, of the prompt, of the answer."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float
    draft_n: int
    draft_n_accepted: int
    kv_bytes: int


class PromptProgress(Answer, frozen=True, kw_only=True):
    """How far a prompt is: tokens in all, read back, and done."""

    total: int
    cache: int
    processed: int
    time_ms: int


class TokenLogprob(Answer, frozen=True, kw_only=True):
    """A token's logprob."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TokenLogprob, frozen=True, kw_only=True):
    """A token's logprob, and those of the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer, frozen=True, kw_only=True):
    """Those of the text's tokens."""

    content: list[TokenLogprobs]
    refusal: None


class FunctionCall(Answer, frozen=True, kw_only=True):
    """A function and its arguments in JSON."""

    name: str
    arguments: str


class ChatToolCall(Answer, frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswerMessage(Answer, frozen=True, kw_only=True):
    """What the model answers."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    reasoning_content: str | UnsetType = UNSET  # what it thought before
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(Answer, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class Head(OfCache, frozen=True, kw_only=True):
    """What all chunks and answers begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatAnswer(Head, frozen=True, kw_only=True):
    """An answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: ChatUsage
    timings: Timings
    session: SessionTurn | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionCallPiece(Answer, frozen=True, kw_only=True):
    """A function's name, once, and a piece of its arguments."""

    name: str | UnsetType = UNSET
    arguments: str


class ChatToolCallPiece(Answer, frozen=True, kw_only=True):
    """A piece of a call; the first one has its id."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallPiece


class ChatDelta(Answer, frozen=True, kw_only=True):
    """What is new of an answer; the first one has the role, the last one is empty."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ChatToolCallPiece] | UnsetType = UNSET


class ChatChunkChoice(Answer, frozen=True, kw_only=True):
    """A piece of one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Chunk(Head, frozen=True, kw_only=True):
    """What chunks of a stream may have beside their choices."""

    usage: ChatUsage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET  # in the last one
    prompt_progress: PromptProgress | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # in the first one of a chat


class ChatChunk(Chunk, frozen=True, kw_only=True):
    """A piece of an answer; after the last one comes the text `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    session: SessionTurn | UnsetType = UNSET  # in the last one
    choices: list[ChatChunkChoice]


class CompletionLogprobs(Answer, frozen=True, kw_only=True):
    """Those of tokens, in the legacy form; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer, frozen=True, kw_only=True):
    """Of one token at a place of the prompt."""

    logprob: float
    decoded_token: str


class CompletionPiece(Answer, frozen=True, kw_only=True):
    """What a choice and a piece of one have in common."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(CompletionPiece, frozen=True, kw_only=True):
    """What follows a prompt."""

    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET  # by token id


class CompletionAnswer(Head, frozen=True, kw_only=True):
    """What follows some prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: ChatUsage
    timings: Timings


class CompletionChunkChoice(CompletionPiece, frozen=True, kw_only=True):
    """A piece of what follows a prompt."""

    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | UnsetType | None = UNSET


class CompletionChunk(Chunk, frozen=True, kw_only=True):
    """A piece of what follows some prompts; after the last one comes the text `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class OutputTextPart(Answer, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprobs]


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Answer, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A text of the answer."""

    id: str
    role: Literal["assistant"]
    content: list[OutputTextPart]
    status: ItemStatus


class OutputCall(Answer, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a tool."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    logprobs: list[TokenLogprobs] | UnsetType = UNSET  # of all tokens that wrote the call, where they are asked for


class ReasoningPart(Answer, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """The text of a thought."""

    text: str


class OutputReasoning(Answer, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before its answer."""

    id: str
    summary: list[Any]
    content: list[ReasoningPart]
    status: ItemStatus


class ResponseUsage(Answer, frozen=True, kw_only=True):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: PromptTokenDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class ResponseFailure(Answer, frozen=True, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Answer, frozen=True, kw_only=True):
    """Why a response is cut."""

    reason: Literal["max_output_tokens"]


class ResponseTool(Answer, frozen=True, kw_only=True):
    """A tool of the request's."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | bool | None
    strict: bool


class ResponseAnswer(OfCache, frozen=True, kw_only=True):
    """A response; what the request said is in it again."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | UnsetType | None = UNSET
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    timings: Timings | UnsetType = UNSET


class ResponseEvent(Answer, frozen=True, kw_only=True):
    """An event of a response's making; which fields it has follows from its `type`, as in OpenAI's API."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int
    response: ResponseAnswer | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: OutputMessage | OutputCall | OutputReasoning | UnsetType = UNSET
    part: OutputTextPart | ReasoningPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[TokenLogprobs] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
