"""Wilson's interval of a proportion, for every room that reports one.

    centre = (p + z^2 / 2n) / (1 + z^2 / n),   half = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

It stays inside 0..1, also for 0 or n hits (Wilson 1927). It knows nothing about what was counted.
"""

import numpy as np

Z95 = 1.959963984540054


def wilson_arrays(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of hits / n, elementwise; (0, 1) where n is 0."""
    n = np.asarray(n, dtype=np.float64)
    safe = np.maximum(n, 1)
    p = hits / safe
    middle = (p + Z95**2 / (2 * safe)) / (1 + Z95**2 / safe)
    half = Z95 / (1 + Z95**2 / safe) * np.sqrt(p * (1 - p) / safe + Z95**2 / (4 * safe**2))
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of hits / n; (0, 1) where n is 0."""
    low, high = wilson_arrays(np.asarray(hits), np.asarray(n))
    return float(low), float(high)
