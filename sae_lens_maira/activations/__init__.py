"""Activation rows of studies: read in memory, harvested to disk, and fed to SAELens' trainer."""

from typing import TYPE_CHECKING

from sae_lens_maira.lazy import lazy_names

if TYPE_CHECKING:
    from sae_lens_maira.activations.cached import export_cached, import_cached
    from sae_lens_maira.activations.direct import DirectProvider
    from sae_lens_maira.activations.harvesting import harvest
    from sae_lens_maira.activations.provider import StoreProvider
    from sae_lens_maira.activations.reader import ActivationBatch, RowReader, layer_of, read_rows
    from sae_lens_maira.activations.rows import ActivationRows, RowProvider, joined
    from sae_lens_maira.activations.sampling import RowSettings, role_rates
    from sae_lens_maira.activations.store import ActivationStore
    from sae_lens_maira.activations.store_spec import StoreSpec

__getattr__ = lazy_names(
    __name__,
    {
        "cached": ("export_cached", "import_cached"),
        "direct": ("DirectProvider",),
        "harvesting": ("harvest",),
        "provider": ("StoreProvider",),
        "reader": ("ActivationBatch", "RowReader", "layer_of", "read_rows"),
        "rows": ("ActivationRows", "RowProvider", "joined"),
        "sampling": ("RowSettings", "role_rates"),
        "store": ("ActivationStore",),
        "store_spec": ("StoreSpec",),
    },
)

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
