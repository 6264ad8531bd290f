"""Order-independent sampling of token positions: one rate per role, decided by (seed, study id, source) alone.

    keep position p   iff   u_p < rate[role_p],   u = uniform numbers of the study's own generator

Restarts, other batches and other numbers of ranks therefore keep the same rows. This is the only sampler of positions
in the package.
"""

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole, resolve_roles
from sae_lens_maira.maira2.roles import LAST_IMAGE_PRESET

RoleRates = Mapping[str, float] | Mapping[TokenRole, float]


def role_rates(
    roles: str | Collection[TokenRole | str], rates: RoleRates | None = None
) -> dict[TokenRole, float]:
    """Rate of every kept role: 1 for the preset's or the named roles, replaced by `rates` where given.

    Args:
        roles: A preset of `maira2.roles` or a list of roles. "paper_last_image" gives the image role no rate: the
            last token of each image is kept whatever the sampler draws.
        rates: Share of a role's rows to keep, from 0 to 1, by role or its name.

    Raises:
        ConfigError: A role or preset is unknown.
        StoreError: A rate is outside 0..1.
    """
    kept = dict.fromkeys(sorted(resolve_roles(roles)), 1.0)
    if roles == LAST_IMAGE_PRESET:
        del kept[TokenRole.IMAGE]
    for name, rate in (rates or {}).items():
        if not 0 <= rate <= 1:
            raise StoreError(f"The rate of role {name!s} is {rate}; expected a share from 0 to 1.")
        (role,) = resolve_roles([name])
        kept[role] = float(rate)
    return {role: rate for role, rate in sorted(kept.items()) if rate > 0}


def rate_table(rates: Mapping[TokenRole, float]) -> np.ndarray:
    """Rates as an array (roles,) indexed by role number."""
    table = np.zeros(len(TokenRole))
    for role, rate in rates.items():
        table[int(role)] = rate
    return table


def kept_positions(roles: np.ndarray, table: np.ndarray, seed: int, study_id: str, source: int) -> np.ndarray:
    """Sample the positions of one study.

    Args:
        roles: (L,) roles of the study's unpadded sequence.
        table: Rates by role number, from `rate_table`.
        seed: Random seed of the sample.
        study_id: The study's id.
        source: Number of the source in `rows.SOURCES`.

    Returns:
        (L,) True where the position is kept.
    """
    digest = hashlib.sha256(f"{seed}/{source}/{study_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    return rng.random(len(roles)) < table[roles]
