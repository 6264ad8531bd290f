"""Whole workflows: a YAML file and a thin script beside it."""
