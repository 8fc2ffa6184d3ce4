"""The HTTP API over the engine: OpenAI's routes, Anthropic's, and kvik's own."""
