"""Ask a running server with the official OpenAI client, streamed and not."""

from __future__ import annotations

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("SAGE_UNIFIED_BASE_URL", "http://127.0.0.1:8889/v1"), api_key="none")
model = client.models.list().data[0].id
question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}

reply = client.chat.completions.create(model=model, messages=[question], max_tokens=32, temperature=0)
print(reply.choices[0].message.content)

for chunk in client.chat.completions.create(
    model=model, messages=[question], max_tokens=32, temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
