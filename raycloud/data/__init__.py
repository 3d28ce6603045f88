"""Data: rows of built-in data sets, files and hub ids; prompts; tokens, labels and the order of samples."""
