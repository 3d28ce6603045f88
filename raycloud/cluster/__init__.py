"""Ray: the actors, how they are placed, rounds, and the jobs. One trust domain."""
