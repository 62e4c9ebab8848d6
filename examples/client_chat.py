"""The same through our own client, which finds the local server by itself."""

from __future__ import annotations

from sagellm import UnifiedInferenceClient

with UnifiedInferenceClient.create() as client:
    reply = client.chat("What is the capital of France? Answer in one sentence.", max_tokens=32, temperature=0)
    print(reply.text, reply.usage["completion_tokens"], "tokens")

    for delta in client.chat(
        "What is the capital of France? Answer in one sentence.", max_tokens=32, temperature=0, stream=True
    ):
        print(delta, end="", flush=True)
    print()
