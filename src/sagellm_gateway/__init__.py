"""HTTP in front of a control plane: the OpenAI, Anthropic and Ollama dialects. `sagellm_gateway.server.create_app` makes the app."""
