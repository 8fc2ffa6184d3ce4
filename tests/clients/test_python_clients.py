"""Python programs and libraries that call models through OpenAI's API, each in the way that its users do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

QUESTION = "Say hello."
TEXT = {"temperature": 0, "max_tokens": 12}


class Trip(BaseModel):
    """Where to, and for how long."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]


TRIP = {
    "title": "trip",
    "description": "Books a trip.",
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}

INSTRUCTOR = """
import sys
from typing import Literal
import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")

class Trip(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]

url, mode, model = sys.argv[1:]
client = instructor.from_openai(OpenAI(base_url=url, api_key="any", max_retries=0), mode=instructor.Mode[mode])
messages = [{"role": "user", "content": "A trip to Rome for 2 days."}]
trip = client.chat.completions.create(
    model=model,
    messages=messages,
    response_model=Anything if mode == "JSON" else Trip,
    max_tokens=200,
    max_retries=0,
    temperature=0,
)
print(trip.model_dump_json())
"""


@pytest.fixture(scope="session")
def greedy(url: str) -> str:
    """The default model's answer, by OpenAI's client."""
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="any") as client:
        messages: Any = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=12)
    return answer.choices[0].message.content or ""


def test_llm(url: str, greedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line `llm`: streamed, with its count of tokens, not streamed, and with a schema."""
    models = [
        {"model_id": "smol", "model_name": "smollm2", "api_base": url, "supports_schema": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "any")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", "-m", "smol", "-o", "temperature", "0", *arguments]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True
        )

    for option in ("--usage", "--no-stream"):
        done = ask("-o", "max_tokens", "12", option, QUESTION)
        assert done.stdout.strip() == greedy.strip()
    assert "12 output" in ask("-o", "max_tokens", "12", "--usage", QUESTION).stderr
    schema = {"type": "object", "properties": {"age": {"enum": [1, 2]}}, "required": ["age"]}
    assert json.loads(ask("--schema", json.dumps(schema | {"additionalProperties": False}), "A child.").stdout)[
        "age"
    ] in (1, 2)


def test_langchain(url: str, greedy: str) -> None:
    """Whole, streamed, a format, forced tools and embeddings."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    server: Any = {"base_url": url, "api_key": "any", "max_retries": 0}
    chat = ChatOpenAI(model="smollm2", **server, **TEXT)
    answer = chat.invoke(QUESTION)
    assert answer.content == greedy
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    assert "".join(str(part.content) for part in chat.stream(QUESTION)) == greedy
    person = ChatOpenAI(model="smollm2", **server, temperature=0, max_tokens=60)
    assert Trip.model_validate(person.with_structured_output(TRIP, method="json_schema", strict=True).invoke("Travel."))
    tools = ChatOpenAI(model="tools", **server, seed=1, max_tokens=300)
    for choice in ("trip", "any"):
        calls = tools.bind_tools([TRIP], tool_choice=choice, parallel_tool_calls=False).invoke("Travel.").tool_calls
        assert [call["name"] for call in calls] == ["trip"]
        Trip.model_validate(calls[0]["args"])
    embeddings = OpenAIEmbeddings(model="smollm2", base_url=url, api_key="any", check_embedding_ctx_length=False)
    assert len(embeddings.embed_query("The sea")) == 576


def test_pydantic_ai(url: str, greedy: str) -> None:
    """Text, streamed text, an output type through a forced tool, and one through a format."""
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key="any")
    smol, tools = (OpenAIChatModel(name, provider=provider) for name in ("smollm2", "tools"))

    async def run() -> None:
        agent = Agent(smol, model_settings=TEXT)
        assert (await agent.run(QUESTION)).output == greedy
        async with agent.run_stream(QUESTION) as stream:
            assert "".join([part async for part in stream.stream_text(delta=True)]) == greedy
        settings = {"max_tokens": 300, "seed": 1, "parallel_tool_calls": False}
        for model, output in ((tools, Trip), (smol, NativeOutput(Trip))):
            given = settings if model is tools else {"max_tokens": 60, "temperature": 0}
            assert isinstance(
                (await Agent(model, output_type=output, model_settings=given).run("Travel.")).output, Trip
            )

    asyncio.run(run())


def test_openai_agents(url: str, greedy: str) -> None:
    """An agent that answers, one whose answer is streamed, and one that calls a tool and reads its result."""
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from agents.exceptions import MaxTurnsExceeded
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    called: list[str] = []

    def weather(city: Literal["Oslo", "Rome"]) -> str:
        """Tell the weather."""
        called.append(city)
        return "Rain"

    async def run() -> None:
        client = AsyncOpenAI(base_url=url, api_key="any")
        smol, tools = (OpenAIChatCompletionsModel(name, client) for name in ("smollm2", "tools"))
        plain = Agent(name="plain", model=smol, model_settings=ModelSettings(**TEXT))
        assert (await Runner.run(plain, QUESTION)).final_output == greedy
        streamed = Runner.run_streamed(plain, QUESTION)
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds
        assert streamed.final_output == greedy
        forced = ModelSettings(
            max_tokens=300, tool_choice="required", parallel_tool_calls=False, extra_body={"seed": 1}
        )
        caller = Agent(name="caller", model=tools, tools=[function_tool(weather)], model_settings=forced)
        # It calls first because it must; whether the random model calls again, with the result before it, is chance.
        with contextlib.suppress(MaxTurnsExceeded):
            await Runner.run(caller, "Weather?", max_turns=2)
        assert 1 <= len(called) <= 2
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA"])
def test_instructor(url: str, mode: str) -> None:
    """Each way in which it asks for a type; it needs an old openai, and has a folder of its own for that.

    Where the format is left to the model, any JSON is one.
    """
    model = "tools" if mode == "TOOLS" else "smollm2"
    done = subprocess.run(
        [sys.executable, "-c", INSTRUCTOR, url, mode, model],
        env={**os.environ, "PYTHONPATH": str(Path(sys.prefix, "instructor"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    if mode != "JSON":
        Trip.model_validate_json(done.stdout)
