"""What the version module says agrees with what the installed libraries do."""

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from transformers import LlavaModel

from sae_lens_maira.maira2 import Maira2, versions

pytestmark = pytest.mark.compat


def test_the_bridge_is_announced_where_it_can_be_imported() -> None:
    found = importlib.util.find_spec("transformer_lens.model_bridge") is not None
    assert versions.has_transformer_bridge() == found


def test_the_cache_keyword_is_one_of_forwards_own() -> None:
    assert versions.cache_keyword() in inspect.signature(LlavaModel.forward).parameters


def test_image_features_come_as_the_library_reads_them(tiny: Maira2) -> None:
    result: Any = tiny.model.model.get_image_features(torch.zeros(2, 3, 56, 56))
    features = result.pooler_output if versions.TRANSFORMERS_5 else result
    assert [tuple(image.shape) for image in features] == [(16, 64), (16, 64)]


def test_text_configurations_are_left_alone_unless_they_need_rewriting() -> None:
    plain = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert versions.portable_text_config(plain) is plain
