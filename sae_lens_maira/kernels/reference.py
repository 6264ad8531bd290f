"""Reference backend: the training step in plain dense PyTorch, with gradients by autograd.

This is the specification and is written for clarity, not speed. It makes every (batch, d_sae) tensor, keeps norms in
the graph (their gradients cancel, which the other backends rely on), and decodes levels one after another. Ties in the
selection go to the lowest flat index, so that the result is unique.
"""

import torch

from sae_lens_maira.kernels.problem import (
    AuxSpec,
    DeadMask,
    Gradients,
    SparseActs,
    StepResult,
    StepSpec,
    Weights,
)


def reference_step(weights: Weights, x: torch.Tensor, spec: StepSpec, dead: DeadMask = None) -> StepResult:
    """Compute losses and gradients of one batch x (batch, d_in), as defined in `problem`."""
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=spec.autocast):
        W_enc, b_enc, W_dec, b_dec = (weight.detach().clone().requires_grad_() for weight in weights)
        centred = x - b_dec if spec.centre else x
        norms = W_dec.norm(dim=-1) if spec.rescale else torch.ones_like(b_enc)
        scaled = (centred @ W_enc + b_enc) * norms
        kept = keep_largest(scaled.detach(), spec.count(len(x)))
        acts = torch.where(kept, scaled, torch.zeros_like(scaled))
        coefficients = acts * (1 / norms)

        prefixes = []
        decoded, start = b_dec, 0
        for width in spec.widths:
            decoded = decoded + coefficients[:, start:width] @ W_dec[start:width]
            prefixes.append(decoded)
            start = width
        level_losses = torch.stack([(prefix - x).square().sum(dim=-1).mean() for prefix in prefixes])
        fired = kept.sum(dim=0)
        mask = dead if dead is None or isinstance(dead, torch.Tensor) else dead(fired)
        aux_loss = _aux_loss(spec, mask, scaled, norms, W_dec, [(x - prefix).detach() for prefix in prefixes])
        loss = (level_losses * level_losses.new_tensor(spec.weights_of_levels)).sum() + aux_loss

    grads = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec))
    rows, cols = kept.nonzero(as_tuple=True)
    values = acts.detach()[rows, cols]
    return StepResult(
        loss=loss.detach(),
        level_losses=level_losses.detach(),
        aux_loss=aux_loss.detach(),
        sae_out=prefixes[-1].detach(),
        acts=SparseActs(rows, cols, values, (len(x), W_dec.shape[0])),
        gradients=Gradients(
            x.new_empty(0) if "W_enc" in spec.frozen else grads[0].T.contiguous(),
            grads[1],
            x.new_empty(0) if "W_dec" in spec.frozen else grads[2],
            grads[3],
        ),
        fired=fired,
        min_positive=values.min() if len(values) else values.new_tensor(torch.inf),
        tokens=len(x),
        backend="reference",
    )


def keep_largest(scaled: torch.Tensor, n: int) -> torch.Tensor:
    """Mask of the n largest positive entries of (batch, d_sae); ties go to the lowest flat index.

    NaN counts as larger than any number, as in torch.topk, so that the loss becomes NaN.
    """
    flat = scaled.flatten()
    order = flat.sort(descending=True, stable=True).indices[:n]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order] = True
    return (kept & ~(flat <= 0)).view_as(scaled)


def _aux_loss(
    spec: StepSpec,
    dead: torch.Tensor | None,
    scaled: torch.Tensor,
    norms: torch.Tensor,
    W_dec: torch.Tensor,
    residuals: list[torch.Tensor],
) -> torch.Tensor:
    nothing = scaled.new_zeros(())
    if dead is None or spec.aux.kind == "none" or not dead.any():
        return nothing
    if spec.aux.kind == "matryoshka":
        spans = zip((0, *spec.widths), spec.widths, residuals, strict=False)
        parts = [
            _aux_of_span(spec.aux, dead, scaled, norms, W_dec, residual, slice(start, stop))
            for start, stop, residual in spans
            if dead[start:stop].any()
        ]
        return torch.stack(parts).sum()
    return _aux_of_span(spec.aux, dead, scaled, norms, W_dec, residuals[-1], slice(None))


def _aux_of_span(
    aux: AuxSpec,
    dead: torch.Tensor,
    scaled: torch.Tensor,
    norms: torch.Tensor,
    W_dec: torch.Tensor,
    residual: torch.Tensor,
    span: slice,
) -> torch.Tensor:
    k_aux = aux.k_aux if aux.k_aux is not None else residual.shape[-1] // 2
    n_dead = int(dead[span].sum())
    acts = scaled[:, span]
    if aux.kind == "dictionary_learning":
        acts = acts.relu()
    ranked = torch.where(dead[span], acts, torch.full_like(acts, -torch.inf))
    top = ranked.topk(min(k_aux, n_dead), dim=-1, sorted=False)
    chosen = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    decoded = (chosen * (1 / norms[span])) @ W_dec[span]
    error = (decoded - residual).square().sum(dim=-1).mean()
    if aux.kind == "dictionary_learning":
        spread = (residual - residual.mean(dim=0)).square().sum(dim=-1).mean()
        return aux.coefficient * (error / spread).nan_to_num(0.0)
    return aux.coefficient * min(n_dead / k_aux, 1.0) * error
