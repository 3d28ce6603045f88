"""One model cut between edge and cloud: plans, parts, generation, and the cloud's side of a session."""
