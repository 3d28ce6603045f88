"""Searches: a space of recipes, Ray Tune runs over it, the rows they leave and what those say when compared."""
