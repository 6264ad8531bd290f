"""Which rows of a study are kept: by role and norm, and by order-independent sampling.

    keep position p   iff   u_p < rate[role_p],   u = uniform numbers of the study's own generator

Restarts, other batches and other numbers of ranks therefore keep the same rows. This is the only sampler of positions
in the package.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import torch

from sae_lens_maira.activations.rows import SOURCES
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole, resolve_roles
from sae_lens_maira.token_roles import DEFAULT_ROLES, LAST_IMAGE_PRESET

RoleRates = Mapping[str, float] | Mapping[TokenRole, float]
Reports = Literal["teacher", "generated", "both", "prompt"]


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Settings that determine which activations are kept.

    Attributes:
        roles: A preset ("content", "paper", "paper_last_image", "text_only", "image_only", "generated_only", "all")
            or a list of roles.
        rates: Share to keep by role, for example `{"image": 0.05}`; adds the role if `roles` lacks it.
        reports: Text after the prompt: "teacher" (the study's own report), "generated" (the model's), "both" of them
            one after the other, or "prompt" (no report).
        batch_size: Studies per forward. Padding changes rounding, so it is part of a store's description.
        max_norm: Drop rows whose norm exceeds this at any of the hook points; None keeps all.
        max_norm_ratio: Drop rows whose norm exceeds this multiple of the median norm at any of the hook points. The
            median is taken per study, source, hook point and modality (image patches, or text) over the positions
            whose role is kept, before `rates` thin them; it is the lower of the two middle values of an even number.
        max_new_tokens: Token limit of a generated report.
        task: Prompt of the study: "findings", or "grounded" for findings with boxes.
        seed: Random seed of the sample that `rates` draw.
    """

    roles: str | Collection[TokenRole | str] = DEFAULT_ROLES
    rates: RoleRates | None = None
    reports: Reports = "teacher"
    batch_size: int = 8
    max_norm: float | None = None
    max_norm_ratio: float | None = None
    max_new_tokens: int = 300
    task: Literal["findings", "grounded"] = "findings"
    seed: int = 0
    kept: dict[TokenRole, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.reports not in get_args(Reports):
            raise StoreError(f"reports is {self.reports!r}; expected one of {', '.join(get_args(Reports))}.")
        if self.batch_size < 1:
            raise StoreError(f"batch_size is {self.batch_size}; expected at least 1 study per forward.")
        for name in ("max_norm", "max_norm_ratio"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise StoreError(f"{name} is {limit}; expected a positive number, or null to keep all rows.")
        object.__setattr__(self, "kept", role_rates(self.roles, self.rates))

    @property
    def last_image(self) -> bool:
        """Whether the last token of each image is always kept, regardless of sampling."""
        return self.roles == LAST_IMAGE_PRESET

    @property
    def sources(self) -> tuple[int, ...]:
        """Numbers of the sources in `SOURCES`."""
        names = ("teacher", "generated") if self.reports == "both" else (self.reports,)
        return tuple(SOURCES.index(name) for name in names)

    @property
    def rates_by_name(self) -> dict[str, float]:
        """Share kept by role name."""
        return {role.name.lower(): rate for role, rate in self.kept.items()}

    def recorded(self) -> dict[str, Any]:
        """Every setting but roles and rates as JSON values, for a store's description.

        `max_new_tokens` is None where no report is generated, since it then changes nothing.
        """
        values = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("roles", "rates", "kept")
        }
        if SOURCES.index("generated") not in self.sources:
            values["max_new_tokens"] = None
        return values | {"last_image": self.last_image}


def role_rates(
    roles: str | Collection[TokenRole | str], rates: RoleRates | None = None
) -> dict[TokenRole, float]:
    """Rate of every kept role: 1 for the preset's or the named roles, replaced by `rates` where given.

    Args:
        roles: A preset of `token_roles` or a list of roles. "paper_last_image" gives the image role no rate: the
            last token of each image is always kept, regardless of sampling.
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


def within_norms(
    norm: torch.Tensor, candidates: np.ndarray, image: np.ndarray, settings: RowSettings
) -> np.ndarray:
    """(L,) True where a position's norm is within the settings' limits."""
    small = np.ones(len(norm), dtype=bool)
    if settings.max_norm is not None:
        small &= (norm <= settings.max_norm).numpy()
    if settings.max_norm_ratio is not None:
        for modality in (image, ~image):
            those = torch.from_numpy(candidates & modality)
            if bool(those.any()):
                limit = settings.max_norm_ratio * norm[those].median()
                small &= (norm <= limit).numpy() | ~modality
    return small
