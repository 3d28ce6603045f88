"""Cut a model into two segments and check that together they are the whole model.

    python examples/segments.py [MODEL] [BLOCK]

A segment is a range of blocks as a module, with the embedding if it begins the model and the head if it ends it.
"""

import sys

import torch

import raycloud


@torch.inference_mode()
def main(model: str = "builtin:smollm2-135m-instruct", block: str = "10") -> None:
    loaded = raycloud.load(model, device="cpu", dtype="float32")
    first = raycloud.Segment(loaded.model, 0, int(block))
    last = raycloud.Segment(loaded.model, int(block))
    ids = torch.tensor([loaded.tokenizer("Edges hold the data, the cloud holds the model.")["input_ids"]])
    hidden = first(ids)
    logits = last(hidden)
    whole = loaded.model(ids).logits
    error = (logits - whole).norm() / whole.norm()
    print(f"cut at block {block}: hidden states {tuple(hidden.shape)}, relative error {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
