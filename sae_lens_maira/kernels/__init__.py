"""Training step of a (Matryoshka) BatchTopK SAE without dense (batch, d_sae) tensors.

One function, `fused_step`, computes the losses and the gradient of every parameter for one batch:

    loss = sum_l c_l mean_b |x_b - prefix_l(b)|^2 + auxiliary loss on dead latents

Three backends give the same numbers: `reference` (dense PyTorch, the specification), `sparse` (PyTorch operators on the
selected entries only, on any device) and `triton` (CUDA). `resolve_backend` returns which one runs. Importing this
package does not import triton.
"""

from sae_lens_maira.kernels.comm import Communicator, LocalCommunicator, ProcessGroupCommunicator
from sae_lens_maira.kernels.dispatch import BACKENDS, Backend, fused_step, resolve_backend
from sae_lens_maira.kernels.problem import AuxSpec, Gradients, SparseActs, StepResult, StepSpec, Weights
from sae_lens_maira.kernels.reference import reference_step
from sae_lens_maira.kernels.workspace import Workspace

__all__ = [
    "BACKENDS",
    "AuxSpec",
    "Backend",
    "Communicator",
    "Gradients",
    "LocalCommunicator",
    "ProcessGroupCommunicator",
    "SparseActs",
    "StepResult",
    "StepSpec",
    "Weights",
    "Workspace",
    "fused_step",
    "reference_step",
    "resolve_backend",
]
