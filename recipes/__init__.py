"""Whole workflows: a YAML file whose first line is the command, and a short script.

Recipes are run as scripts. They may share code with one another; the library never imports them
(`tests/test_imports.py`).
"""
