"""Loading reads no more than it has to: the first layers only, and a GPU's weights without a copy in main memory."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sae_lens_maira.errors import CheckpointError, ConfigError
from sae_lens_maira.maira2 import Maira2, Maira2ForConditionalGeneration, load_maira2
from sae_lens_maira.maira2.versions import TRANSFORMERS_5

pytestmark = pytest.mark.compat


class CountingFile:
    """safetensors' open file that writes down the bytes of every tensor that is read from it."""

    read: dict[str, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, **kwargs)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        value = self.file.get_tensor(name)
        self.read[name] = value.nbytes
        return value

    def get_slice(self, name: str) -> Any:
        return CountingSlice(self.file.get_slice(name), name, self.read)


class CountingSlice:
    def __init__(self, part: Any, name: str, read: dict[str, int]) -> None:
        self.part, self.name, self.read = part, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        value = self.part[index]
        self.read[self.name] = value.nbytes
        return value


def test_a_partial_load_reads_only_its_layers(
    tiny: Maira2, saved: Path, study: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes are counted where safetensors hands them out; activations of the layers that are there are exact."""
    monkeypatch.setattr("transformers.modeling_utils.safe_open", CountingFile)
    CountingFile.read = {}
    load_maira2(saved, dtype=torch.float32)
    whole, CountingFile.read = CountingFile.read, {}
    part = load_maira2(saved, dtype=torch.float32, layers=1)
    sizes = {p: t.nbytes for p, t in tiny.model.state_dict().items()}
    assert sum(whole.values()) >= sum(sizes.values())
    left_out = {name for name in whole if ".layers." in name and "language_model.model.layers.0." not in name}
    left_out = {name for name in left_out if name.startswith("language_model")}
    assert left_out
    assert set(CountingFile.read) == set(whole) - left_out
    assert sum(CountingFile.read.values()) == sum(n for k, n in whole.items() if k not in left_out)
    assert "UNEXPECTED" not in capfd.readouterr().err

    inputs = tiny.processor.encode(study).model_inputs()
    kept: list[torch.Tensor] = []
    for model in (tiny.model, part.model):
        layer = model.model.language_model.layers[0]  # pyright: ignore[reportIndexIssue]
        handle = layer.register_forward_hook(lambda _, __, out: kept.append(out))
        with torch.no_grad(), contextlib.suppress(CheckpointError):
            model(**inputs)
        handle.remove()
    first, second = (value[0] if isinstance(value, tuple) else value for value in kept)
    assert torch.equal(first, second)
    with pytest.raises(CheckpointError, match="stop_at_layer=1"):
        part.model(**inputs)
    for wrong in (0, 99):
        with pytest.raises(ConfigError, match="decoder layers; use 1 to"):
            load_maira2(saved, layers=wrong)


def test_a_gpu_gets_its_weights_without_a_copy_in_main_memory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every device but the CPU is named to transformers, which reads each tensor straight to it."""
    asked: list[Any] = []
    original = Maira2ForConditionalGeneration.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def watch(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        asked.append(device_map)
        # The meta device stands for the GPU; transformers 4.56 cannot read to it.
        stand_in = {"": "meta"} if device_map and TRANSFORMERS_5 else None
        return original(cls, *args, device_map=stand_in, **kwargs)

    monkeypatch.setattr(Maira2ForConditionalGeneration, "from_pretrained", classmethod(watch))
    monkeypatch.setattr(Maira2ForConditionalGeneration, "to", lambda self, device: self)
    monkeypatch.setattr("sae_lens_maira.maira2.loading.check_device", lambda name: None)
    for rank in (0, 1):
        model = load_maira2(saved, device=f"cuda:{rank}").model
        assert asked.pop() == {"": f"cuda:{rank}"}
        in_main_memory = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
        assert in_main_memory == 0 or not TRANSFORMERS_5
    load_maira2(saved, device="cpu")
    assert asked == [None]
