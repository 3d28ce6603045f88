"""Data: built-in sets, files and hub ids as rows; prompts; tokens, labels and the order of samples."""
