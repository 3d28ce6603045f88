"""Training loop of all jobs: optimiser groups, schedule, accumulation, clipping, seeded dropout, exact resume."""
