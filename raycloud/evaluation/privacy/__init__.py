"""Privacy of a split model: attacks on the hidden states that the cloud sees, each with its measured recovery."""
