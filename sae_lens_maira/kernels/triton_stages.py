"""Table of the triton backend: the kernel of each stage.

Importing this module imports triton; `dispatch` does so only when the backend runs.
"""

from sae_lens_maira.kernels.step import Stages
from sae_lens_maira.kernels.triton_latent_backward import latent_backward
from sae_lens_maira.kernels.triton_prefix_decode import prefix_decode
from sae_lens_maira.kernels.triton_scores import encode, select

TRITON = Stages("triton", encode, select, prefix_decode, latent_backward, bf16_operands=True)
