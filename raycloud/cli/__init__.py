"""Command line: one small file per verb, which imports its job when it is called."""
