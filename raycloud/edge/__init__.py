"""Edge device: an OpenAI-compatible server and a terminal chat, without ray."""
