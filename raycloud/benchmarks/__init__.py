"""Benchmarks, one file each; every one prints a table and, with --json, one JSON object as its last line."""
