"""Which positions a spliced SAE acts on, in the prompt and in every later step of generation.

Positions are chosen by token id or by token role. Ids are seen where the model embeds them; roles come with
the encoding, and whatever `generate` adds to it is REPORT.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._names import Point
from sae_lens_maira.maira2 import TokenRole, resolve_roles

Bypass = Callable[[torch.Tensor], torch.Tensor | None]
"""Value `(B, L, ...)` -> bool `(B, L)`, True where it passes unchanged; None where nothing passes."""


class Positions:
    """The ids and roles of the run at hand."""

    def __init__(self) -> None:
        self.roles: torch.Tensor | None = None
        self.ids: torch.Tensor | None = None

    @contextmanager
    def following(self, model: nn.Module, roles: torch.Tensor | None) -> Iterator[None]:
        """Follow a run of the model.

        Args:
            model: A `Maira2ForConditionalGeneration`.
            roles: `(B, L)` token roles of its input, if known.
        """

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.ids = args[0]

        handle = model.get_submodule("model.language_model.embed_tokens").register_forward_pre_hook(see)
        self.roles = roles
        try:
            yield
        finally:
            handle.remove()
            self.roles = self.ids = None

    def bypass(self, point: Point, tokenizer: Any, exclude: bool | Sequence[int], roles: Any) -> Bypass:
        """Make the choice of positions for one point.

        Args:
            point: Hook point of the values.
            tokenizer: Needed for `exclude=True`.
            exclude: Token ids that pass unchanged; True for BOS, EOS, PAD and SEP.
            roles: Roles that do not pass unchanged; None for all.

        Raises:
            HookError: The point has no text positions, or the tokenizer is missing; when called, no roles
                or no ids are known.
        """
        ids = _special_ids(tokenizer) if exclude is True else list(exclude or ())
        wanted = None if roles is None else sorted(int(role) for role in resolve_roles(roles))
        if not ids and wanted is None:
            return lambda _: None
        if point.prefill_only:
            raise HookError(
                f"exclude_special_tokens and roles select text positions, but {point.name!r} holds image"
                " patches. Splice the SAE in without them."
            )
        return lambda x: self._passed(x, ids, wanted)

    def _passed(self, x: torch.Tensor, ids: list[int], wanted: list[int] | None) -> torch.Tensor:
        rows, length = x.shape[:2]
        passed = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
        if ids:
            if self.ids is None:
                raise HookError(_UNKNOWN.format(what="token ids"))
            passed |= torch.isin(self.ids.to(x.device), torch.tensor(ids, device=x.device))
        if wanted is not None:
            passed |= ~torch.isin(
                self._roles_of(rows, length, x.device), torch.tensor(wanted, device=x.device)
            )
        return passed

    def _roles_of(self, rows: int, length: int, device: torch.device) -> torch.Tensor:
        if self.roles is None:
            raise HookError(_UNKNOWN.format(what="token roles"))
        known = self.roles.to(device).long()
        if length != known.shape[1]:  # a later step: the new token, or the whole text without a cache
            new = length - known.shape[1] if length > known.shape[1] else length
            known = torch.cat([known, known.new_full((len(known), new), int(TokenRole.REPORT))], dim=1)[
                :, -length:
            ]
        return known.repeat_interleave(rows // len(known), dim=0)  # beams are next to their row


_UNKNOWN = (
    "The SAE acts at some positions only, but this run carries no {what}. Call the hooked model itself"
    " with a study or a Maira2Encoding, not the model inside it."
)


def _special_ids(tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise HookError(
            "exclude_special_tokens=True needs a tokenizer, and this model was wrapped without a"
            " processor. Pass the token ids as a list."
        )
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
    return [i for name in names if (i := getattr(tokenizer, name, None)) is not None]
