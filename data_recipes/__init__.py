"""Recipes that make training data: the demo's data, converters of public data sets, mixtures of the papers' tables."""
