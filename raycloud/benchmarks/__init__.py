"""Benchmarks, one file each: ``run(**sizes)`` measures and returns a :class:`~.measure.Measured`.

Only ``raycloud bench`` runs them. ``QUICK`` in a file holds the sizes of a quick run, which does everything once with
small sizes. It shows that the benchmark works; its figures have no other meaning.
"""
