"""The HTTP server: many prefixes and one base, OpenAI's routes in front. `server.run` starts it."""
