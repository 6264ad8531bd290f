"""From studies to activation rows, and from rows to SAELens' trainer."""

from sae_lens_maira.activations.rows import ActivationRows, RowProvider, harvest_rows

__all__ = ["ActivationRows", "RowProvider", "harvest_rows"]
