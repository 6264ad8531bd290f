"""Packages whose names are imported when they are first used, so that importing one of them loads no heavy library."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, sources: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: Name of the package.
        sources: Module of the package -> the names that it provides. No name may be that of a module.
    """
    module_of = {name: module for module, names in sources.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)  # looked up once
        return value

    return getattr_


__all__ = ["lazy_names"]
