"""The one training loop: optimiser groups, schedule, accumulation, clipping, seeded dropout, exact resume."""
