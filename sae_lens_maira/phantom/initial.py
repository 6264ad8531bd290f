"""Initial weights of the phantom: a tower that already resolves detail, position and scale.

transformers draws every weight with standard deviation 0.02, right for width 4096 and far too small for width 128:
four projector layers would shrink a signal 3,000-fold. Here a linear layer gets 1 / sqrt(fan_in); the patch
embedding gets the whitened principal components of the images' patches, w_i = u_i / sqrt(lambda_i + eps), so that a
thin line weighs as much as overall brightness; positions get sines and cosines of row and column.
MAIRA-2's tower arrives pretrained; this and the sight phase replace that.
"""

import math

import torch
from torch import nn

from sae_lens_maira.maira2 import Maira2ForConditionalGeneration


def initialise(model: Maira2ForConditionalGeneration, images: torch.Tensor) -> None:
    """Set the tower's and the projector's first weights, in place.

    Args:
        model: A freshly constructed phantom.
        images: (n, S, S) pixels of a few hundred images, one channel, as the processor gives them.
    """
    tower = model.model.vision_tower
    with torch.no_grad():
        for part in (tower, model.model.multi_modal_projector):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
        patch = tower.config.patch_size
        _whiten(tower.embeddings.patch_embeddings.projection, images.float(), patch)
        side = images.shape[-1] // patch
        positions = _sines(side, tower.config.hidden_size)
        tower.embeddings.position_embeddings[0, 1:] = positions


def _whiten(projection: nn.Conv2d, images: torch.Tensor, patch: int) -> None:
    pieces = images.unfold(1, patch, patch).unfold(2, patch, patch).reshape(-1, patch * patch)
    mean = pieces.mean(0)
    covariance = (pieces - mean).T @ (pieces - mean) / len(pieces)
    values, vectors = torch.linalg.eigh(covariance)
    keep = min(projection.out_channels, len(values))
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    # Components below the 40th are image grain: whitening them fully would feed the tower noise.
    weight = 0.5 * (vectors / (values + values[min(40, keep - 1)]).sqrt()).T
    channels = projection.in_channels
    projection.weight.zero_()
    projection.weight[:keep] = weight.reshape(keep, 1, patch, patch).expand(-1, channels, -1, -1) / channels
    if projection.bias is not None:
        projection.bias.zero_()
        projection.bias[:keep] = -(weight @ mean)


def _sines(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sines and cosines of the row in the first half, of the column in the second."""
    quarter = width // 4
    frequency = math.pi / 2 * 20.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    rows = wave[:, None].expand(side, side, -1)
    columns = wave[None].expand(side, side, -1)
    return 0.4 * torch.cat([rows, columns], -1).reshape(side * side, -1)
