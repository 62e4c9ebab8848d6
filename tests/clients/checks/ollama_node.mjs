// The ollama package for JavaScript: node ollama_node.mjs ROOT_URL
import { Ollama } from "ollama";
import { check, equal, fails, run } from "./runner.mjs";

const client = new Ollama({ host: process.argv[2] });
const body = (content, more = {}) => ({ model: "mock", messages: [{ role: "user", content }], ...more });
const tools = [{
  type: "function",
  function: { name: "get_weather", description: "", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } },
}];
const HELLO = "Hello there, friend.";

check("chat_plain", async () => equal((await client.chat(body("hello"))).message.content, HELLO));
check("chat_stream", async () => {
  let text = "";
  for await (const part of await client.chat(body("hello", { stream: true }))) text += part.message.content;
  equal(text, HELLO);
});
check("chat_options", async () => equal((await client.chat(body("hello", { options: { num_predict: 5 } }))).done_reason, "length"));
check("chat_tools", async () => {
  const call = (await client.chat(body("weather?", { tools }))).message.tool_calls[0];
  equal([call.function.name, call.function.arguments], ["get_weather", { city: "Paris" }]);
});
check("chat_format", async () => equal(JSON.parse((await client.chat(body("as JSON", { format: "json" }))).message.content).name, "Ada"));
check("generate", async () => equal((await client.generate({ model: "mock", prompt: "hello" })).response, HELLO));
check("generate_stream", async () => {
  let text = "";
  for await (const part of await client.generate({ model: "mock", prompt: "hello", stream: true })) text += part.response;
  equal(text, HELLO);
});
check("list", async () => equal((await client.list()).models.some((m) => m.name === "mock"), true));
check("show", async () => equal(Boolean((await client.show({ model: "mock" })).model_info), true));
check("error_not_found", () => fails(() => client.chat(body("x", { model: "none" })), (e) => String(e).includes("none")));
check("abort", async () => {
  const stream = await client.chat(body("count slowly", { stream: true }));
  for await (const _ of stream) { stream.abort(); break; }
  equal((await client.chat(body("hello"))).message.content, HELLO);
});
await run();
