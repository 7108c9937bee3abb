"""The HTTP server: generate, score and compare over FastAPI."""
