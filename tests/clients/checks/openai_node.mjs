// The openai package for Node: node openai_node.mjs ROOT_URL
import OpenAI from "openai";
import { check, equal, fails, run } from "./runner.mjs";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const chat = (content, more = {}) => client.chat.completions.create({ model: "mock", messages: user(content), ...more });
const tool = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } },
};
const HELLO = "Hello there, friend.";

check("chat_plain", async () => equal((await chat("hello")).choices[0].message.content, HELLO));
check("chat_stream", async () => {
  let text = "";
  for await (const chunk of await chat("hello", { stream: true })) text += chunk.choices[0]?.delta?.content || "";
  equal(text, HELLO);
});
check("chat_stream_usage", async () => {
  let last;
  for await (const chunk of await chat("hello", { stream: true, stream_options: { include_usage: true } })) last = chunk;
  equal(last.choices, []);
  equal(last.usage.completion_tokens > 0, true);
});
check("chat_stream_helper", async () => {
  const stream = client.chat.completions.stream({ model: "mock", messages: user("hello") });
  equal((await stream.finalChatCompletion()).choices[0].message.content, HELLO);
});
check("chat_tools", async () => {
  const choice = (await chat("weather?", { tools: [tool] })).choices[0];
  equal(choice.finish_reason, "tool_calls");
  equal(JSON.parse(choice.message.tool_calls[0].function.arguments), { city: "Paris" });
});
check("chat_tools_stream_helper", async () => {
  const stream = client.chat.completions.stream({ model: "mock", messages: user("weather?"), tools: [tool] });
  const call = (await stream.finalMessage()).tool_calls[0];
  equal([call.function.name, JSON.parse(call.function.arguments)], ["get_weather", { city: "Paris" }]);
});
check("chat_run_tools", async () => {
  const runner = client.chat.completions.runTools({
    model: "mock",
    messages: user("weather?"),
    tools: [{ type: "function", function: { ...tool.function, function: () => "18", parse: JSON.parse } }],
  });
  equal(await runner.finalContent(), "It is 18 degrees in Paris.");
});
check("chat_n", async () => equal((await chat("hello", { n: 2 })).choices.length, 2));
check("chat_logprobs", async () => {
  const content = (await chat("hello", { logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
  equal(content[0].top_logprobs.length, 2);
});
check("chat_length", async () => equal((await chat("hello", { max_tokens: 5 })).choices[0].finish_reason, "length"));
check("chat_stop", async () => equal((await chat("hello", { stop: [" there"] })).choices[0].message.content, "Hello"));
check("chat_json", async () => {
  const answer = await chat("as JSON", { response_format: { type: "json_object" } });
  equal(JSON.parse(answer.choices[0].message.content).name, "Ada");
});
check("chat_abort", async () => {
  const stream = await chat("count slowly", { stream: true });
  for await (const _ of stream) break;
  equal((await chat("hello")).choices[0].message.content, HELLO);
});
check("completions", async () =>
  equal((await client.completions.create({ model: "mock", prompt: "hello", max_tokens: 50 })).choices[0].text, HELLO));
check("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  equal(ids.includes("mock"), true);
});
check("responses_plain", async () =>
  equal((await client.responses.create({ model: "mock", input: "hello" })).output_text, HELLO));
check("responses_state", async () => {
  const one = await client.responses.create({ model: "mock", input: "hello" });
  const two = await client.responses.create({ model: "mock", input: "hello again", previous_response_id: one.id });
  equal((await client.responses.retrieve(two.id)).previous_response_id, one.id);
});
check("responses_stream", async () => {
  let text = "";
  const stream = await client.responses.create({ model: "mock", input: "hello", stream: true });
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  equal(text, HELLO);
});
check("responses_stream_helper", async () => {
  const stream = client.responses.stream({ model: "mock", input: "hello" });
  equal((await stream.finalResponse()).output_text, HELLO);
});
check("error_not_found", () =>
  fails(() => client.chat.completions.create({ model: "none", messages: user("x") }),
    (e) => e instanceof OpenAI.NotFoundError && e.code === "model_not_found" && Boolean(e.requestID)));
check("error_bad_request", () =>
  fails(() => chat("hello", { temperature: 9 }), (e) => e instanceof OpenAI.BadRequestError && e.param === "temperature"));
check("error_unavailable", () => fails(() => chat("go away"), (e) => e.status === 503));
check("error_in_mid_stream", () =>
  fails(async () => { for await (const _ of await chat("break off", { stream: true })); }, (e) => e instanceof OpenAI.APIError));
await run();
