"""Which tokens of a study are kept: a rate a role, drawn from (seed, study id, source) alone.

    keep position p   iff   u_p < rate[role_p],   u = uniform numbers of this study's own generator

So restarts, other batches and other numbers of ranks keep the same rows. It knows nothing about models.
"""

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole, resolve_roles

RoleRates = Mapping[str, float] | Mapping[TokenRole, float]


def role_rates(
    roles: str | Collection[TokenRole | str], rates: RoleRates | None = None
) -> dict[TokenRole, float]:
    """Rate of every kept role: 1 for the preset's or the named roles, replaced by `rates` where given.

    Args:
        roles: a preset ("paper", "text_only", "image_only", "generated_only", "all") or roles.
        rates: role or its name -> share of its rows to keep, in 0..1.

    Raises:
        ConfigError: an unknown role or preset.
        StoreError: a rate outside 0..1.
    """
    kept = dict.fromkeys(sorted(resolve_roles(roles)), 1.0)
    for name, rate in (rates or {}).items():
        if not 0 <= rate <= 1:
            raise StoreError(f"The rate of role {name!s} is {rate}; expected a share from 0 to 1.")
        (role,) = resolve_roles([name])
        kept[role] = float(rate)
    return {role: rate for role, rate in sorted(kept.items()) if rate > 0}


def rate_table(rates: Mapping[TokenRole, float]) -> np.ndarray:
    """(roles,) rate by role number."""
    table = np.zeros(len(TokenRole))
    for role, rate in rates.items():
        table[int(role)] = rate
    return table


def kept_positions(roles: np.ndarray, table: np.ndarray, seed: int, study_id: str, source: int) -> np.ndarray:
    """(L,) True where a study's position is kept.

    Args:
        roles: (L,) roles of the study's unpadded sequence.
        table: of `rate_table`.
        seed: of the harvest.
        study_id: the study's id.
        source: 0 teacher-forced, 1 generated.
    """
    digest = hashlib.sha256(f"{seed}/{source}/{study_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    return rng.random(len(roles)) < table[roles]
