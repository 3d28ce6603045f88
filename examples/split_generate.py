"""Generate text with a model cut at two blocks: the edge's blocks here, the cloud's here or behind an address.

    python examples/split_generate.py [MODEL] [START_BLOCK] [END_BLOCK] [wss://HOST/v1/split]

Only hidden states cross from one side to the other. Without an address both sides run in this process.
"""

import sys

import raycloud

MODEL, START_BLOCK, END_BLOCK = "builtin:smollm2-135m-instruct", 4, 26


def main(model: str = MODEL, start: str = str(START_BLOCK), end: str = str(END_BLOCK), cloud: str = "") -> None:
    split = raycloud.SplitModel.from_pretrained(model, start_block=int(start), end_block=int(end), cloud=cloud or None)
    prompt = "The three primary colours are"
    print(prompt, end="")
    for text in split.stream(prompt, max_new_tokens=24):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
