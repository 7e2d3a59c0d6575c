"""Memory and time of a run, counted from config.json and the recipe: nothing is loaded, torch is not imported."""
