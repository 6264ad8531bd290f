"""An SAE whose latents are divided over ranks: columns of W_enc, entries of b_enc and rows of W_dec of each rank.

    latent j is on rank j mod N                  whole SAE of rank 0 -> shares;   shares -> checkpoint of one process

The SAE object stays, with `cfg.d_sae` latents by its configuration and the tensors of its share. Counts per latent (4
to 8 bytes each) are whole on every rank, and so are b_dec and the threshold.
"""

from functools import partial
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

from sae_lens_maira.errors import BackendError, SAEError
from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.kernels.own_latents import check_levels, latents_of
from sae_lens_maira.training.architectures import StepPlan, reason_for_dense

COLUMNS = "W_enc"
DIVIDED = (COLUMNS, "b_enc", "W_dec", "first_directions")
"""Tensors of an SAE that are divided, by the latents of their rows, or columns."""


class LatentShares:
    """Divides an SAE and puts it together again."""

    def __init__(self, sae: TrainingSAE[Any], comm: ProcessGroupCommunicator, device: str) -> None:
        """Replace the SAE's tensors by shares of rank 0's on a device.

        Args:
            sae: The whole SAE on rank 0, best in memory of the host; the others' may be on the device "meta".
            comm: The ranks.
            device: Device of the shares.
        """
        self._sae, self._comm, self._d_sae = sae, comm, int(sae.cfg.d_sae)
        self._own = [latents_of(rank, comm.size) for rank in range(comm.size)]
        self._names = [name for name in DIVIDED if hasattr(sae, name)]
        self._whole: dict[str, Tensor] = {}
        for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
            if name in self._names:
                share = comm.scatter_(
                    self._empty_share(name, device), self._own, _rows(name, tensor.detach())
                )
                self._replace(name, _rows(name, share))
            else:
                every = torch.empty_like(tensor, device=device)
                self._replace(name, comm.broadcast_(every.copy_(tensor) if comm.rank == 0 else every))
        sae.to(device)
        self._hooks = [
            sae.register_state_dict_post_hook(partial(self._put_whole)),  # torch writes to the function
            sae.register_load_state_dict_pre_hook(self._take_shares),
        ]

    def own(self, name: str, whole: Tensor) -> Tensor:
        """Take the share of this rank from a tensor of the whole SAE."""
        return _rows(name, _rows(name, whole)[self._own[self._comm.rank]]) if name in self._names else whole

    def collect(self) -> None:
        """Send all shares to rank 0, which holds the whole in memory of the host for one `state_dict`."""
        self._whole = {}
        for name in self._names:
            share = _rows(name, getattr(self._sae, name).detach())
            rows = self._comm.collect(share, self._own, self._d_sae)
            if rows is not None:
                self._whole[name] = _rows(name, rows).contiguous()

    def restore(self) -> None:
        """Make the SAE of rank 0 whole again, in memory of the host; every rank has to call this."""
        self.collect()
        if self._comm.rank > 0:
            return
        for hook in self._hooks:
            hook.remove()
        self._sae.to("cpu")
        for name, tensor in self._whole.items():
            self._replace(name, tensor)
        self._whole = {}

    def _empty_share(self, name: str, device: str) -> Tensor:
        like = _rows(name, getattr(self._sae, name))
        number = len(range(self._d_sae)[self._own[self._comm.rank]])
        return torch.empty(number, *like.shape[1:], dtype=like.dtype, device=device)

    def _replace(self, name: str, tensor: Tensor) -> None:
        before = getattr(self._sae, name)
        parameter = isinstance(before, nn.Parameter)
        setattr(self._sae, name, nn.Parameter(tensor, before.requires_grad) if parameter else tensor)

    def _put_whole(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        whole, self._whole = self._whole, {}
        if not whole:
            raise SAEError(
                f"This SAE has the latents of rank {self._comm.rank} of {self._comm.size} only, so it cannot be saved "
                "by itself. Call the trainer's save_checkpoint on every rank, or save what `fit` returns on rank 0."
            )
        state_dict.update({f"{prefix}{name}": tensor for name, tensor in whole.items()})

    def _take_shares(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *other: Any) -> None:
        for name in self._names:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = self.own(name, state_dict[f"{prefix}{name}"])


def check_division(
    sae: TrainingSAE[Any],
    comm: ProcessGroupCommunicator,
    backend: str,
    shard_optimizer: bool,
    evaluator: Any,
) -> None:
    """Refuse what cannot be trained with latents divided over ranks.

    Raises:
        BackendError: One of the settings does not go with it; the message names all that do not.
    """
    reasons = []
    if shard_optimizer:
        reasons.append(
            "shard_optimizer is set too, and moments are divided with their latents (leave it out)"
        )
    if backend == "reference":
        reasons.append(
            'the backend is "reference", which works in one process only (use "sparse" or "triton")'
        )
    if evaluator is not None:
        reasons.append(
            "an evaluator was given, and it needs the whole SAE (leave it out and evaluate saved checkpoints)"
        )
    dense = reason_for_dense(sae, torch.empty(1, sae.cfg.d_in))
    if dense is not None:
        reasons.append(f"the fused step does not apply: {dense} (remove the cause)")
    if reasons:
        raise BackendError(
            f"Latents cannot be divided over {comm.size} ranks: {'; '.join(reasons)}. Expected the fused step alone on "
            "every rank. Otherwise leave shard_latents out."
        )
    check_levels(StepPlan(sae).widths, comm.size)


def _rows(name: str, tensor: Tensor) -> Tensor:
    """A tensor with latents as rows, or back."""
    return tensor.T if name == COLUMNS else tensor
