"""Searches: spaces of recipes, Ray Tune runs over them, rows of finished trials and their comparison."""
