"""Recipes of steering experiments; run them as scripts with their YAML files."""
