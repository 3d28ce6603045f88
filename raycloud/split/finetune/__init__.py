"""Split fine-tuning: edge and cloud train one model together, and only rows and their gradients cross."""
