"""Ray actors, their placement, rounds and jobs. All processes of a cluster are in one trust domain."""
