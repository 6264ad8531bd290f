"""A model by the name that commands give it: "phantom", a folder or a hub id.

It decides where a model runs and in which dtype when the user did not; under torchrun that is the GPU of the local
rank. It knows nothing about what is done with a model.
"""

import os
from typing import TYPE_CHECKING, Literal, get_args

from sae_lens_maira.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_maira.maira2 import Maira2

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(ModelDtype)


def named_model(model: str, *, dtype: str = "auto", device: str = "auto") -> "Maira2":
    """Load a model.

    Args:
        model: "phantom", a folder or a hub id.
        dtype: float32, bfloat16 or float16; "auto" is float32 for the phantom and bfloat16 for others.
        device: cpu, cuda, cuda:1 ...; "auto" is a GPU where there is one.

    Raises:
        ConfigError: the dtype is none of those, or there is no such device.
        CheckpointError: the folder holds no MAIRA-2.
    """
    import torch

    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.phantom import phantom_path

    place = device_of(device)
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype of the model was {dtype!r}; use {', '.join(DTYPES)}.")
    shipped = model == "phantom"
    kind = ("float32" if shipped else "bfloat16") if dtype == "auto" else dtype
    return load_maira2(phantom_path() if shipped else model, dtype=getattr(torch, kind), device=place)


def device_of(name: str) -> str:
    """The device that a word names; "auto" is a GPU where there is one, the local rank's under torchrun.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    import torch

    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}; use auto, cpu, cuda, cuda:1 ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"The device was {name!r}, and torch sees no GPU here; use --device cpu or auto.")
    return name


__all__ = ["DTYPES", "ModelDtype", "device_of", "named_model"]
