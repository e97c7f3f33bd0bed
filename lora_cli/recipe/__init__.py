"""What is asked for: one YAML file, one schema, and every problem of it with its place."""

from lora_cli.recipe.dump import differences, dump_recipe, json_schema, recipe_values
from lora_cli.recipe.keys import all_keys, meaning, section_of
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import (
    FIELDS,
    MOST_SAMPLES,
    TEMPLATES,
    AdapterRecipe,
    Allowed,
    DataRecipe,
    Droppable,
    Recipe,
    SourceRecipe,
    TrainRecipe,
)
