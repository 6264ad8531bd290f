"""SAELens' trainer with the fused step: same configuration, logging, schedules, evaluation and checkpoints.

Only what happens between a batch and the updated weights is replaced: losses and gradients come from
`kernels.fused_step`, clipping and Adam run in one pass, and firing statistics come from the kept entries.
Where the fused step does not apply (hooks on the SAE, an unknown class) SAELens' own step runs, and a warning gives
the reason once. W_enc is kept in memory as (d_sae, d_in), so that its gradient is written row by row; every
state dict shows it contiguous.
"""

import warnings
from collections import deque
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import (
    T_TRAINING_SAE,
    T_TRAINING_SAE_CONFIG,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from typing_extensions import override

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import (
    LocalCommunicator,
    ProcessGroupCommunicator,
    StepResult,
    Workspace,
    fused_step,
    resolve_backend,
)
from sae_lens_maira.kernels.dispatch import Backend, resolve_candidates, say_if_emulated
from sae_lens_maira.kernels.problem import AskedCandidates, Candidates
from sae_lens_maira.training.architectures import (
    StepPlan,
    check_architecture,
    reason_for_dense,
    set_missing_threshold,
)
from sae_lens_maira.training.captured import StepGraphs, reason_for_no_graphs
from sae_lens_maira.training.checkpoints import SavingTrainer, contiguous_W_enc, provider_state
from sae_lens_maira.training.inputs import agree_on_scaling, not_finite_error
from sae_lens_maira.training.interruption import SafePoints
from sae_lens_maira.training.latent_shares import LatentShares, check_division
from sae_lens_maira.training.update import apply_gradients, gradient_buffers, make_optimizer, rows_are_unit

LAST_BATCHES = 32
"""Batches that give the threshold of a run that is too short to set it."""


class FusedSAETrainer(SavingTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """Drop-in for `sae_lens.training.sae_trainer.SAETrainer`, generic in the SAE and its configuration as that is.

    Over N processes (`comm`, a `ProcessGroupCommunicator`), `cfg.train_batch_size_samples` is the batch of all ranks
    together, every rank's data provider yields its share of the rows, and losses, selection and gradients are those of
    one process with all rows. Rank 0 writes checkpoints and logs. With `shard_latents` every rank has its share of the
    latents and gathers all rows; `fit` then returns the whole SAE, in memory of the host, on rank 0 only.

    `TrainStepOutput` holds detached tensors; `feature_acts` is a coalesced sparse tensor, and `hidden_pre` is the same
    tensor, since a kept pre-activation is positive and thus equals its activation. With `shard_latents` the rows are
    those of all ranks, and `feature_acts` has the entries of this rank's latents.

    Attributes:
        backend: The backend that runs: "triton", "sparse" or "reference".
        dense_reason: Why the last step ran densely; None if it did not.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: DataProvider,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        backend: Backend = "auto",
        candidates: AskedCandidates = "off",
        sole_writer: bool = False,
        comm: ProcessGroupCommunicator | None = None,
        shard_optimizer: bool = False,
        shard_latents: bool = False,
        cuda_graph: bool = False,
        run_settings: dict[str, Any] | None = None,
    ) -> None:
        """Builds SAELens' trainer, then its optimiser and scheduler again over the fused Adam.

        Args:
            cfg: SAELens' configuration.
            sae: Any TrainingSAE; see `architectures.SUPPORTED` for those that run fused.
            data_provider: Batches (rows, d_in).
            evaluator: As in SAELens.
            save_checkpoint_fn: As in SAELens.
            backend: Which kernels run.
            candidates: "bf16" or "tf32" find candidates in low precision first; the result stays exact. "auto" does so
                where it is faster. A CPU without AVX-512 has no bfloat16 product: "bf16" is then four times slower
                than "off", and a warning is given once.
            sole_writer: Promises that nothing but this trainer writes to the weights between steps. The next step then
                uses the row norms and bfloat16 copies that Adam's triton kernel made. Writes that torch counts are
                noticed, those through `.data` would not be. Triton only.
            comm: The other ranks.
            shard_optimizer: Divide the optimizer's moments over the ranks (`ShardedAdam`): less memory and a shorter
                update. A rank that dies takes its moments along, so no rescue checkpoint is written then.
            shard_latents: Divide the latents over the ranks (`LatentShares`): a rank has weights, gradients and moments
                of its share. The SAE given on rank 0 may be in memory of the host; the others' are not read. No rescue
                checkpoint is written, and there is no evaluation during the training.
            cuda_graph: Record steps without dead latents in CUDA graphs (see `captured`); needs triton and one process,
                and `sole_writer` in the dictionary_learning convention. Tensors of a step's output are then overwritten
                by the next step. Where it is not possible the reason is given once and steps run without.
            run_settings: Further settings for the checkpoints, such as the seed: a run with others does not continue
                from them.

        Raises:
            BackendError: The backend cannot run on the SAE's device, or latents cannot be divided.
            SAEError: The SAE's normalisation works with no trainer.
        """
        check_architecture(sae)
        self.comm = LocalCommunicator() if comm is None else comm
        self.run_settings = run_settings or {}
        if self.comm.rank > 0 and cfg.logger.log_to_wandb:
            cfg = replace(cfg, logger=replace(cfg.logger, log_to_wandb=False))
        if cfg.lr_end is None:  # as SAELens' runner configurations do; its trainer asserts that somebody has
            cfg = replace(cfg, lr_end=cfg.lr / 10)
        self.backend: Backend = resolve_backend(backend, cfg.device)
        group = self.comm if isinstance(self.comm, ProcessGroupCommunicator) else None
        if shard_latents and group is not None:
            check_division(sae, group, self.backend, shard_optimizer, evaluator)
            self.shares = LatentShares(sae, group, cfg.device)
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        if sole_writer and self.backend != "triton":
            raise BackendError(
                f"sole_writer was set, but the backend is {self.backend}. Only triton's Adam makes norms and copies "
                "for the next step; leave sole_writer out."
            )
        self.candidates: Candidates = resolve_candidates(
            candidates, cfg.device, sae.cfg.d_in, cfg.autocast, sae.dtype
        )
        say_if_emulated(self.candidates, cfg.device)
        self.dense_reason: str | None = None
        self._reasons_said: set[str] = set()
        self._safe_points = SafePoints()
        self._tokens = 0
        self._fired = torch.empty(0)
        self._minima: deque[torch.Tensor] = deque(maxlen=LAST_BATCHES)
        self._scale: float | None = None
        self._workspace = Workspace()
        assert cfg.lr_end is not None
        divided = self.shares is not None
        self.optimizer = make_optimizer(
            sae, cfg, self.comm, self.backend, sole_writer, shard_optimizer, divided
        )
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )
        self._sole_writer = sole_writer
        self._n_dead = 0
        self._graphs: StepGraphs | None = None
        if cuda_graph:
            reason = reason_for_no_graphs(
                self.backend, cfg.device, self.comm.size, getattr(sae.cfg, "control", None)
            )
            self._graphs = StepGraphs(self, self._change, reason)
        sae.register_state_dict_post_hook(contiguous_W_enc)
        if group is not None and not divided:
            for tensor in (*sae.parameters(), *sae.buffers()):
                group.broadcast_(tensor.data)

    @override
    def fit(self) -> T_TRAINING_SAE:
        """Trains to the end.

        An interrupt (SIGINT, SIGTERM) takes effect between two updates. With a checkpoint path it leaves a checkpoint
        `<samples>` and is raised. Over several ranks, so is any failure, as `rescue_<samples>`.
        """
        group = self.comm if isinstance(self.comm, ProcessGroupCommunicator) else None
        with self._safe_points.installed():
            try:
                # Also in a single process: its scale is then that of any number of ranks to the last bits.
                if group is not None or self.sae.cfg.normalize_activations == "expected_average_only_in":
                    agree_on_scaling(self, self.comm)
                return self._finished(super().fit())
            except (KeyboardInterrupt, InterruptedException):
                if group is None and self.cfg.checkpoint_path is not None:
                    self.save_checkpoint(str(self.n_training_samples))
                elif group is not None:
                    self.save_rescue()
                raise
            except Exception:
                if group is not None:
                    self.save_rescue()
                raise

    @override
    @torch.no_grad()
    def set_final_sae_metadata(self) -> None:
        """Also set a threshold that the run was too short to set, from its last batches."""
        super().set_final_sae_metadata()
        minima = [value for value in map(float, self._minima) if isfinite(value)]
        set_missing_threshold(self.sae, minima, self._scale, self.n_training_steps, warn=self.comm.rank == 0)

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        """One step on this rank's raw rows; counts the rows of all ranks, and none if the step fails."""
        before = self.n_training_samples
        try:
            output = super().step(batch)
        except BaseException:
            self.n_training_samples = before
            raise
        self.n_training_samples = before + self._tokens
        # Noted behind a whole step: one that fails has drawn its batch, and a resumed run draws it again.
        self._place = provider_state(self.data_provider)
        return output

    @override
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """SAELens' numbers; over several ranks L0 is that of all rows and latents."""
        logged = super().build_train_step_log_dict(output, n_training_samples)
        if self.comm.size > 1:
            logged["metrics/l0"] = float(self._fired.sum()) / self._tokens
        return logged

    @override
    def _train_step(self, sae: T_TRAINING_SAE, sae_in: torch.Tensor) -> TrainStepOutput:
        reason = self.dense_reason = reason_for_dense(sae, sae_in)
        if reason is not None:
            self._say_once(reason)
            self._tokens = len(sae_in)
            with self._safe_points.safe():
                pass
            output = super()._train_step(sae, sae_in)
            StepPlan(sae).constrain_()
            return output
        sae.train()
        self._lay_out_W_enc(sae)
        x = sae_in.detach().to(sae.dtype)
        plan = StepPlan(sae, self.cfg.autocast, self.candidates)
        with self._safe_points.safe():
            if self.shares is not None:
                sae_in = x = self.comm.gather_rows(x)
            self._tokens = len(x) if self.shares is not None else sum(self.comm.counts(len(x)))
            self._prepare(plan, x)
            # Sizes of the auxiliary loss differ from step to step, so steps with dead latents run without graphs.
            graphs = None if self._n_dead else self._graphs
            captured = graphs and graphs.losses(
                plan, x, self._workspace, gradient_buffers(sae, self._workspace)
            )
            result = captured.result if captured is not None else self._losses(plan, x)
        # Nothing that can fail is left, on any rank: from here on state changes.
        if captured is not None:
            captured.update()
        else:
            self._change(plan, result)
        self._n_dead, self._fired = result.n_dead, result.fired
        if plan.unit_decoder and self.n_training_steps <= plan.sae.cfg.threshold_start_step:
            self._minima.append(result.min_positive.clone())
            self._scale = self.activation_scaler.scaling_factor
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        acts = result.acts.to_coo()
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=result.sae_out,
            feature_acts=acts,
            hidden_pre=acts,
            loss=result.loss,
            losses=plan.losses(result),
            metrics={"topk_threshold": sae.topk_threshold},
        )

    def _losses(self, plan: StepPlan, x: torch.Tensor) -> StepResult:
        """Losses and gradients of centred rows (rows, d_in), checked; nothing is changed."""
        result = fused_step(
            plan.weights(),
            x,
            plan.spec,
            plan.dead(self.dead_neurons, self._tokens),
            backend=self.backend,
            workspace=self._workspace,
            comm=self.comm,
            out=gradient_buffers(plan.sae, self._workspace),
            own_rows=self.sharded,
            own_latents=self.shares is not None,
        )
        if not isfinite(float(result.loss)):
            raise not_finite_error(plan.sae, x, self.n_training_steps)
        return result

    @torch.no_grad()
    def _change(self, plan: StepPlan, result: StepResult) -> None:
        """Everything on the device that a step changes."""
        plan.after(result, self.n_training_steps)
        self._record_firing(result)
        apply_gradients(self.optimizer, plan, result, self._workspace if self._sole_writer else None)

    def _prepare(self, plan: StepPlan, x: torch.Tensor) -> None:
        first = self.n_training_steps == 0
        if rows_are_unit(self.optimizer, plan.sae, self._workspace) and not first:
            return
        if plan.unit_decoder and first and not bool(torch.isfinite(x).all()):
            raise not_finite_error(plan.sae, x, self.n_training_steps)
        rows = x
        if plan.unit_decoder and first and self.shares is None:
            rows = self.comm.gather_rows(x)
        step_input = TrainStepInput(
            sae_in=rows,
            dead_neuron_mask=None,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        plan.before(rows, step_input)

    @torch.no_grad()
    def _record_firing(self, result: StepResult) -> None:
        if self.backend == "triton":
            from sae_lens_maira.kernels.triton_stats import (
                record_firing_,
            )  # triton is imported only when it runs

            record_firing_(result.fired, self.act_freq_scores, self.n_forward_passes_since_fired)
        else:
            self.n_forward_passes_since_fired += 1
            self.n_forward_passes_since_fired[result.fired > 0] = 0
            self.act_freq_scores += result.fired

    @torch.no_grad()
    def _lay_out_W_enc(self, sae: TrainingSAE[Any]) -> None:
        if not sae.W_enc.T.is_contiguous():
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T

    @torch.no_grad()
    def _finished(self, sae: T_TRAINING_SAE) -> T_TRAINING_SAE:
        """The SAE in SAELens' memory order; whole on rank 0."""
        if self.shares is not None:
            self.shares.restore()
        sae.W_enc.data = sae.W_enc.data.contiguous()
        return sae

    def _say_once(self, reason: str) -> None:
        if self.comm.size > 1:
            raise BackendError(
                f"Training over {self.comm.size} ranks needs the fused step, which does not apply: {reason}. "
                "Train in one process, or remove the cause."
            )
        if reason not in self._reasons_said:
            self._reasons_said.add(reason)
            warnings.warn(
                f"The fused step does not apply: {reason}. SAELens' dense step runs instead; it gives the same "
                "result, more slowly.",
                stacklevel=2,
            )
