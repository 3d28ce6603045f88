"""Ask a model the questions of a file and print ROUGE-L and perplexity.

    python examples/evaluate.py [MODEL] [DATA]

A recipe can be built in Python, or read from YAML: ``raycloud.run("evaluate.yaml", limit=8)``.
"""

import sys

import raycloud
from raycloud.evaluation.recipe import EvaluateRecipe


def main(model: str = "builtin:smollm2-135m-instruct", data: str = "builtin:instruct") -> None:
    recipe = EvaluateRecipe(models=[model], data=[data], split="all", limit=8, seeds=[10], format="chat")
    result = raycloud.run(recipe, **{"generation.max_new_tokens": 32})
    for name, models in result.summary["sets"].items():
        for scores in models.values():
            rouge = scores["rougeL"]["mean"]
            print(f"{name}: ROUGE-L {rouge:.2f}, perplexity {scores['perplexity']:.2f}, {scores['tokens']} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
