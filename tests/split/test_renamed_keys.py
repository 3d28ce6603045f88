"""Former keys of the split recipes are refused with a line that names the new ones."""

from __future__ import annotations

import pytest

from raycloud.errors import RecipeError
from raycloud.recipe import Recipe
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.recipe import SplitEvaluateRecipe


@pytest.mark.parametrize(
    ("recipe", "former", "new"),
    [
        (SplitTuneRecipe, "split", "start_block"),
        (SplitTuneRecipe, "second", "end_block"),
        (SplitTuneRecipe, "cut", "uplink"),
        (SplitTuneRecipe, "back", "downlink"),
        (SplitTuneRecipe, "learning", "trainable"),
        (SplitTuneRecipe, "depth", "max_in_flight"),
        (SplitTuneRecipe, "data.held_out", "held_out_samples"),
        (SplitTuneRecipe, "uplink.form", "dtype"),
        (SplitTuneRecipe, "uplink.outliers", "num_outliers"),
        (SplitTuneRecipe, "uplink.changes", "activation_delta"),
        (SplitTuneRecipe, "downlink.form", "dtype"),
        (SplitTuneRecipe, "downlink.outliers", "num_outliers"),
        (SplitTuneRecipe, "downlink.changes", "activation_delta"),
        (SplitEvaluateRecipe, "first", "start_block"),
        (SplitEvaluateRecipe, "second", "end_block"),
    ],
)
def test_a_former_key_is_refused_with_the_new_one(recipe: type[Recipe], former: str, new: str) -> None:
    with pytest.raises(RecipeError, match=rf"^recipe: {former}: this key is called {new} now$"):
        recipe.parse({}, [f"{former}=1"])
