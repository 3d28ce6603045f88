"""Split inference: pipeline and client of the edge; engine, sessions and server of the cloud."""
