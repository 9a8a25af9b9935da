"""The HTTP server: OpenAI's completions on one engine."""
