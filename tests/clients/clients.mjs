// OpenAI's client and Vercel's AI SDK in Node: what each made of the server's answers, as one line of JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const baseURL = process.argv[2];
const prompt = "Say hello.";
const messages = [{ role: "user", content: prompt }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const found = {};

const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const plain = { model: "smollm2", messages, temperature: 0, max_tokens: 12 };
found.whole = (await client.chat.completions.create(plain)).choices[0].message.content;
found.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...plain, stream: true })) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
}
const helper = client.chat.completions.stream({ ...plain, max_tokens: 60, guided_regex: "[A-Z][a-z ]{20}[.]" });
found.helper = (await helper.finalChatCompletion()).choices[0].message.content;
const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];
const forced = { model: "tools", messages, tools, tool_choice: "required", parallel_tool_calls: false };
const calls = client.chat.completions.stream({ ...forced, max_tokens: 300 });
found.calls = (await calls.finalChatCompletion()).choices[0].message.tool_calls.map((call) => call.function);
found.width = (await client.embeddings.create({ model: "smollm2", input: "The sea" })).data[0].embedding.length;
try {
  await client.chat.completions.create({ model: "none", messages });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.code, error.param, error.requestID !== undefined];
}

const kvik = createOpenAICompatible({ name: "kvik", baseURL, supportsStructuredOutputs: true });
const text = { model: kvik("smollm2"), prompt, temperature: 0, maxOutputTokens: 12 };
const generated = await generateText(text);
found.generated = [generated.text, generated.finishReason, generated.usage.outputTokens];
found.parts = "";
for await (const part of streamText(text).textStream) found.parts += part;
found.object = (await generateObject({ model: kvik("smollm2"), prompt: "A city.", schema: jsonSchema(schema) })).object;
const execute = async ({ city }) => `Rain in ${city}`;
const called = await generateText({
  model: kvik("tools"),
  prompt: "Weather?",
  toolChoice: "required",
  maxOutputTokens: 300,
  seed: 1,
  providerOptions: { kvik: { parallel_tool_calls: false } },
  tools: { weather: tool({ inputSchema: jsonSchema(schema), execute }) },
});
found.results = called.toolResults.map((result) => result.output);
console.log(JSON.stringify(found));
