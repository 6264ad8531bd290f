"""Activation rows of studies: read in memory, harvested to disk, and fed to SAELens' trainer."""

from sae_lens_maira.activations.cached import export_cached, import_cached
from sae_lens_maira.activations.direct import DirectProvider
from sae_lens_maira.activations.harvest import harvest
from sae_lens_maira.activations.provider import StoreProvider
from sae_lens_maira.activations.reader import ActivationBatch, RowReader, layer_of, read_rows
from sae_lens_maira.activations.rows import ActivationRows, RowProvider, joined
from sae_lens_maira.activations.sampling import RowSettings, role_rates
from sae_lens_maira.activations.store import ActivationStore
from sae_lens_maira.activations.store_spec import StoreSpec

__all__ = [
    "ActivationBatch",
    "ActivationRows",
    "ActivationStore",
    "DirectProvider",
    "RowProvider",
    "RowReader",
    "RowSettings",
    "StoreProvider",
    "StoreSpec",
    "export_cached",
    "harvest",
    "import_cached",
    "joined",
    "layer_of",
    "read_rows",
    "role_rates",
]
