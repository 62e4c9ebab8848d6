// The @anthropic-ai/sdk package: node anthropic_node.mjs ROOT_URL
import Anthropic from "@anthropic-ai/sdk";
import { check, equal, fails, run } from "./runner.mjs";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const body = (content, more = {}) => ({ model: "mock", max_tokens: 200, messages: [{ role: "user", content }], ...more });
const tools = [{ name: "get_weather", input_schema: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } }];
const HELLO = "Hello there, friend.";

check("message_plain", async () => equal((await client.messages.create(body("hello"))).content[0].text, HELLO));
check("message_stream", async () => {
  let text = "";
  for await (const event of await client.messages.create(body("hello", { stream: true })))
    if (event.type === "content_block_delta") text += event.delta.text;
  equal(text, HELLO);
});
check("message_stream_helper", async () => {
  const stream = client.messages.stream(body("hello"));
  equal((await stream.finalMessage()).content[0].text, HELLO);
});
check("message_tools", async () => {
  const answer = await client.messages.create(body("weather?", { tools }));
  equal(answer.stop_reason, "tool_use");
  equal(answer.content.find((b) => b.type === "tool_use").input, { city: "Paris" });
});
check("message_tools_stream", async () => {
  const answer = await client.messages.stream(body("weather?", { tools })).finalMessage();
  equal(answer.content.find((b) => b.type === "tool_use").input, { city: "Paris" });
});
check("message_max_tokens", async () => equal((await client.messages.create(body("hello", { max_tokens: 5 }))).stop_reason, "max_tokens"));
check("message_stop_sequence", async () =>
  equal((await client.messages.create(body("hello", { stop_sequences: [", "] }))).stop_sequence, ", "));
check("count_tokens", async () => {
  const { max_tokens, ...rest } = body("hello");
  equal((await client.messages.countTokens(rest)).input_tokens > 0, true);
});
check("models", async () => equal((await client.models.retrieve("mock")).id, "mock"));
check("error_not_found", () =>
  fails(() => client.messages.create(body("x", { model: "none" })), (e) => e instanceof Anthropic.NotFoundError && Boolean(e.requestID)));
check("error_bad_request", () =>
  fails(() => client.messages.create(body("x", { temperature: 3 })), (e) => e instanceof Anthropic.BadRequestError));
check("error_in_mid_stream", () =>
  fails(async () => { for await (const _ of await client.messages.create(body("break off", { stream: true }))); }, (e) => e instanceof Anthropic.APIError));
await run();
