"""From studies to activation rows, in memory or on disk, and from rows to SAELens' trainer."""

from sae_lens_maira.activations.cached import export_cached, import_cached
from sae_lens_maira.activations.direct import DirectProvider
from sae_lens_maira.activations.forward import RowReader, RowSettings
from sae_lens_maira.activations.harvest import harvest
from sae_lens_maira.activations.provider import StoreProvider
from sae_lens_maira.activations.rows import ActivationRows, RowProvider, harvest_rows, joined, layer_of
from sae_lens_maira.activations.sampling import role_rates
from sae_lens_maira.activations.store import ActivationStore, StoreSpec

__all__ = [
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
    "harvest_rows",
    "import_cached",
    "joined",
    "layer_of",
    "role_rates",
]
