"""Importing this package changes nothing in the process: no nnsight, no method on every object, backward as before."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import sae_lens_maira

PACKAGES = [
    *(f"sae_lens_maira.{module.name}" for module in pkgutil.iter_modules(sae_lens_maira.__path__)),
    "sae_lens_maira.hooks",
]
# hooks.nnsight is the one module that imports nnsight; the other two need the library that they are for.
GUESTS = {"sae_lens_maira.hooks.nnsight", "sae_lens_maira.hooks.bridge", "sae_lens_maira.dashboards.adapter"}
MODULES = [
    f"{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(getattr(importlib.import_module(package), "__path__", ()))
    if not module.name.startswith("_") and f"{package}.{module.name}" not in GUESTS
]

AFTER = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        if public not in ("Maira2NNsight", "to_bridge"):
            getattr(module, public)
assert "nnsight" not in sys.modules
assert not hasattr(object, "save"), "a method was put on every object"

import asyncio, contextlib
import torch
w = torch.ones(2, requires_grad=True)
with contextlib.nullcontext(): w.sum().backward()
assert w.grad is not None and w.grad.tolist() == [1, 1], "a one-line backward did nothing"

import anyio
async def work():
    await anyio.sleep(0)
    return 7
assert anyio.run(work) == 7
try:
    import beartype
except ModuleNotFoundError as error:
    assert error.name == "beartype"
"""


def test_every_public_module_in_one_fresh_process():
    """All public names but the two that ask for nnsight or the bridge; then what nnsight's import breaks."""
    assert len(MODULES) > 100
    subprocess.run([sys.executable, "-c", AFTER, *PACKAGES, *MODULES], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_each_public_module_in_a_fresh_process(name: str):
    """The same, module by module, so that none needs another to be imported first."""
    subprocess.run([sys.executable, "-c", AFTER, name], check=True)


def test_nnsight_comes_with_its_own_class():
    """Asking for `Maira2NNsight` imports nnsight."""
    code = (
        "import sys, sae_lens_maira.hooks as hooks\n"
        "assert 'nnsight' not in sys.modules\n"
        "hooks.Maira2NNsight\n"
        "assert 'nnsight' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_are_the_modules_own():
    """`hooks.__all__` and its lookup table name the same things."""
    hooks = importlib.import_module("sae_lens_maira.hooks")
    assert sorted(hooks.__all__) == sorted(hooks._MODULE_OF)
