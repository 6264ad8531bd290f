"""What a store holds, and how two descriptions of it differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("bfloat16", "float32")
"""Types of the stored numbers."""
SEGMENT = 1024
"""Rows per checked piece; the unit in which readers shuffle."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds; two harvests may share a folder only if theirs are equal.

    Attributes:
        hooks: Hook name -> d_in.
        dtype: "bfloat16" or "float32".
        shard_studies: Studies per shard.
        n_studies: Studies in all.
        rates: Role name -> share of its rows that is kept.
        settings: Everything else that decides which rows come out.
        model, processor: Fingerprints.
        versions: Versions of the libraries; recorded, not compared.
        source: Request with which the store was made ("model" and "checkpoint" of the model, "dtype" of its
            weights, "studies": "table" or "phantom"), for commands that use the store without loading the model;
            recorded, not compared by `create`.
    """

    hooks: dict[str, int]
    dtype: str
    shard_studies: int
    n_studies: int
    rates: dict[str, float]
    settings: dict[str, Any]
    model: str
    processor: str
    versions: dict[str, str]
    source: dict[str, str] = field(default_factory=dict)

    @property
    def n_shards(self) -> int:
        """Shards of a finished store."""
        return -(-self.n_studies // self.shard_studies)


def differences(held: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two descriptions, each as "name is X in the store and Y here".

    Args:
        held: Description of a store, as of `dataclasses.asdict`; entries of `versions` and `source` are not compared.
        asked: Description of what is wanted; entries that it lacks are not compared.
        prefix: Name of the part that the two describe.
    """
    found = []
    for name, wanted in asked.items():
        has = held.get(name)
        if name in ("versions", "source") and not prefix:
            continue
        if isinstance(wanted, dict) and isinstance(has, dict):
            both = {key: wanted.get(key) for key in has.keys() | wanted.keys()}
            found += differences(has, dict(sorted(both.items())), f"{prefix}{name}.")
        elif has != wanted:
            found.append(f"{prefix}{name} is {has!r} in the store and {wanted!r} here")
    return found


def other_model(held: dict[str, str], asked: dict[str, str]) -> list[str]:
    """How the checkpoint, or the dtype of its weights, differs from that of a store, as `differences` says it.

    Args:
        held: `StoreSpec.source` of the store.
        asked: The same of the model that is named now.
    """
    names = ("checkpoint", "dtype")
    return differences(
        {name: held.get(name) for name in names}, {name: asked[name] for name in names}, "model "
    )


def other_studies(held: Sequence[str], asked: Sequence[str]) -> str:
    """How the studies of a store differ from those that are given."""
    if len(held) != len(asked):
        return f"the store has {len(held):,} studies and {len(asked):,} are given here"
    first = next(i for i, (a, b) in enumerate(zip(held, asked, strict=True)) if a != b)
    return f"study {first} is {held[first]} in the store and {asked[first]} here"


__all__ = ["DTYPES", "SEGMENT", "StoreSpec", "differences", "other_model", "other_studies"]
