"use strict";
// What a model says goes in as text, never as markup.
const $ = (id) => document.getElementById(id);
const messages = [];
let running = null;

const headers = () => {
  const found = { "content-type": "application/json" };
  if ($("key").value) found.authorization = "Bearer " + $("key").value;
  return found;
};

const turn = (role, text) => {
  const box = document.createElement("div");
  box.className = "turn " + role;
  box.textContent = text;
  $("log").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
};

const loadModels = async () => {
  const answer = await fetch("v1/models", { headers: headers() });
  $("key").hidden = answer.status !== 401 && !$("key").value;
  if (!answer.ok) return;
  $("model").replaceChildren();
  for (const model of (await answer.json()).data) {
    if (model.kind !== "llm") continue;
    const option = document.createElement("option");
    option.value = option.textContent = model.id;
    $("model").append(option);
  }
};

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const block = rest.slice(0, end);
      rest = rest.slice(end + 2);
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
    }
  }
}

const ask = async (text) => {
  messages.push({ role: "user", content: text });
  turn("user", text);
  const box = turn("assistant", "");
  const body = { model: $("model").value, messages, stream: true, stream_options: { include_usage: true } };
  running = new AbortController();
  $("send").textContent = "Stop";
  const began = performance.now();
  let said = "";
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of eventsOf(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        const seconds = (performance.now() - began) / 1000;
        $("note").textContent = event.usage.completion_tokens + " tokens in " + seconds.toFixed(1) + " s";
      }
      said += (event.choices[0] && event.choices[0].delta.content) || "";
      box.textContent = said;
    }
  } catch (error) {
    if (error.name !== "AbortError") turn("assistant error", error.message);
  }
  if (said) messages.push({ role: "assistant", content: said });
  running = null;
  $("send").textContent = "Send";
};

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = $("prompt").value.trim();
  if (!text) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
});
$("key").addEventListener("change", loadModels);
loadModels();
