"""No server at all: the engine runs in this process."""

from __future__ import annotations

from sagellm import UnifiedInferenceClient

with UnifiedInferenceClient.create(embedded=True, default_llm_model="smollm2:135m") as client:
    print(client.chat("What is the capital of France? Answer in one sentence.", max_tokens=32, temperature=0))
