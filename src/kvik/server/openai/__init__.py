"""OpenAI's routes: chat, completions and Responses."""
