"""The triton backend as one object: which kernel stands for which stage.

Importing this module imports triton; `dispatch` does so only when the backend runs. It knows nothing else.
"""

from sae_lens_maira.kernels.step import Stages
from sae_lens_maira.kernels.triton_latent_backward import latent_backward
from sae_lens_maira.kernels.triton_prefix_decode import prefix_decode
from sae_lens_maira.kernels.triton_select import TritonScores

TRITON = Stages("triton", TritonScores, prefix_decode, latent_backward, bf16_operands=True)
