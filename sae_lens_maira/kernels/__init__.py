"""The training step of a (Matryoshka) BatchTopK SAE without its dense (batch, d_sae) tensors.

One function, `fused_step`, gives the losses and every parameter's gradient of one batch:

    loss = sum_l c_l mean_b |x_b - prefix_l(b)|^2 + auxiliary loss on dead latents

Three backends give the same numbers: `reference` (dense PyTorch, the specification), `sparse` (PyTorch
operators that touch the selected entries only, on any device) and `triton` (CUDA). `resolve_backend` says
which one runs. Importing this package imports no triton.
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
