"""A local web application to steer and question reports by hand; needs the extra `workbench`.

The package has the name of its one function and can be called like it: `sm.workbench(m, sae, study)`, described at
`sae_lens_maira.workbench.run.workbench`.
"""

import sys
from types import ModuleType
from typing import Any


def workbench(*args: Any, **keywords: Any) -> Any:
    """Start a workbench in this process; see `sae_lens_maira.workbench.run.workbench`.

    Raises:
        WorkbenchError: Starlette or uvicorn is not installed, the port is taken, or two studies have one id.
    """
    try:
        from sae_lens_maira.workbench.run import workbench as start
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        from sae_lens_maira.errors import WorkbenchError

        raise WorkbenchError(
            f"The workbench needs {error.name}. Install it: pip install 'sae-lens-maira[workbench]'"
        ) from error
    return start(*args, **keywords)


class _CallablePackage(ModuleType):
    """A package that can be called, because importing it replaces the function of the same name."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return workbench(*args, **keywords)


sys.modules[__name__].__class__ = _CallablePackage

__all__ = ["workbench"]
