"""transformers.Trainer with the guarantees that a long run needs.

Additions: exact counts of tokens, FLOPs and loss; a stop at the first non-finite value, before it reaches the weights;
checkpoints that are complete or absent. Schedule, accumulation, mixed precision, torchrun and FSDP are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from nestlearn import atomic
from nestlearn.models.files import first_non_finite_parameter
from nestlearn.optim import MatrixOptimizer
from nestlearn.train import checkpoint, meter
from nestlearn.train.errors import NonFiniteError
from nestlearn.train.finite import first_non_finite_gradient, locate_non_finite
from nestlearn.train.sharding import process_mesh, shard, whole_weights
from nestlearn.train.stream import RecordedStream


class HopeTrainer(Trainer):
    """The training engine. Use `nestlearn.train.train` unless you need to change the loop itself.

    Args:
        token_bytes: bytes of text of each token id, Long[vocabulary] (0 for special tokens).
        flops_per_token: forward FLOPs of one token; a multiply-add counts 2.
        meter: the sums of the run; a resumed run continues with its earlier ones.
        eval_bytes_per_target: bytes per predicted token of the evaluation set, to log its bits per byte.
        make_optimizer: makes the optimizer of a model; None for the engine's own.
    """

    def __init__(
        self,
        *args: Any,
        token_bytes: Tensor,
        flops_per_token: float,
        meter: meter.Meter,
        eval_bytes_per_target: float | None = None,
        make_optimizer: Callable[[nn.Module], Optimizer] | None = None,
        shard_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._make_optimizer, self._shard_size = make_optimizer, shard_size
        self.token_bytes, self.flops_per_token = token_bytes, flops_per_token
        self.meter, self.eval_bytes_per_target = meter, eval_bytes_per_target
        self._staging: Path | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """The engine's, which divides parameters over the processes of a CPU as well.

        accelerate does so on accelerators only, and would train replicas without a word. What it calls works with gloo.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            settings: dict[str, Any] = self.args.fsdp_plugin_args or {}
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Mixed precision of a divided model, which the engine leaves to the units: here parameters stay wide."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # An optimizer is made for parameters that are divided already.
        if self.is_fsdp_enabled:
            shard(cast(nn.Module, self.model), process_mesh(self._shard_size, self.args.device))
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._restore_parameters()
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._restore_parameters()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _restore_parameters(self) -> None:
        """Give the optimizer of a divided model the parameters that it was made with.

        The engine replaces them, and finds them again by the address of their part. Empty parts have none, so it takes
        one for another.
        """
        if self.is_fsdp_enabled:
            groups = cast(Optimizer, self.optimizer).param_groups
            for group, parameters in zip(groups, self._parameters, strict=True):
                group["params"] = parameters

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.args.output_dir or ".")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of forward and backward on one batch."""
        return int(3 * self.flops_per_token * inputs["input_ids"].numel())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay applies to parameters of two or more dimensions, not to norms and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The run's optimizer. The engine calls this after it has placed the model on its devices."""
        if self.optimizer is None and self._make_optimizer is not None:
            trained: Any = self.model if model is None else model
            self.optimizer = self._make_optimizer(trained)
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, MatrixOptimizer) and self.accelerator.num_processes > 1 and not self.is_fsdp_enabled:
            optimizer.process_group = dist.group.WORLD
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The held-out batches. Unlike in training, they include a last batch that is not full."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Training and the held-out loss do not use the final state, and to build it costs a write per layer.
        return {**super()._prepare_inputs(inputs), "use_cache": False}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass, counted. Raises NonFiniteError before an update changes the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        if not torch.isfinite(loss):
            component = locate_non_finite(model, self._prepare_inputs(inputs))
            raise NonFiniteError(f"The loss is {value}", self._step, component, checkpoint.last_checkpoint(self.out))
        processes = self.accelerator.num_processes
        targets, byte_count = meter.count_targets(inputs["labels"], self.token_bytes)
        # The engine divides by the targets of the whole update and multiplies by the number of processes.
        scale = targets if num_items_in_batch is None else float(num_items_in_batch) / processes
        self.meter.nats += value * scale
        self.meter.targets += targets
        self.meter.bytes += byte_count
        self.meter.tokens += inputs["input_ids"].numel() * processes
        self.meter.flops += self.floating_point_ops(inputs) * processes
        return loss

    @property
    def _step(self) -> int:
        return self.state.global_step + 1

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        engine = self.accelerator
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or engine.scaler is not None)
        if plain:
            # Clipping by a NaN norm would spread NaN to every gradient, so the norm is checked first.
            parameters = [p for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self._require_finite(model, norm)
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
            return norm
        norm = super()._clip_grad_norm(model)
        if engine.scaler is None and norm is not None:
            self._require_finite(model, torch.as_tensor(norm))
        return norm

    def _require_finite(self, model: nn.Module, norm: Tensor) -> None:
        if not torch.isfinite(norm):
            component = first_non_finite_gradient(model) or "the norm of all gradients (each one is finite)"
            what = f"The gradient norm is {float(norm)}"
            raise NonFiniteError(what, self._step, component, checkpoint.last_checkpoint(self.out))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the engine's log entry and append it to the run's train.jsonl."""
        held_out = logs.get("eval_loss", 0.0)
        if not math.isfinite(held_out):
            raise self._not_finite(f"The held-out loss is {held_out}")
        if "loss" in logs:
            self._reduce_interval()
            logs |= {**self.meter.take_interval(), **self.meter.totals()}
        elif "eval_loss" in logs and self.eval_bytes_per_target:
            logs["eval_bits_per_byte"] = meter.nats_to_bits_per_byte(logs["eval_loss"], self.eval_bytes_per_target)
            logs |= self.meter.totals()
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            wanted = ("loss", "bits_per_byte", "tokens", "seconds", "flops", "learning_rate", "grad_norm",
                      "eval_loss", "eval_bits_per_byte")  # fmt: skip
            line = {"step": self.state.global_step, **{key: logs[key] for key in wanted if key in logs}}
            meter.append_line(self.out, line)

    def _reduce_interval(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        own = torch.tensor([self.meter.nats, self.meter.targets, self.meter.bytes], device=self.args.device)
        gathered = cast(Tensor, self.accelerator.gather(own.view(1, 3)))
        nats, targets, byte_count = gathered.sum(0).tolist()
        self.meter.nats, self.meter.targets, self.meter.bytes = nats, int(targets), int(byte_count)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _not_finite(self, what: str) -> NonFiniteError:
        """The error for a state that is not finite after the update of the present step."""
        component = first_non_finite_parameter(cast(nn.Module, self.model)) or "the output (each parameter is finite)"
        return NonFiniteError(what, self.state.global_step, component, checkpoint.last_checkpoint(self.out))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-STEP, complete or absent; a failure leaves older ones as they were."""
        if first_non_finite_parameter(model) is not None:
            raise self._not_finite("The update made a weight NaN or infinite")
        final = self.out / f"checkpoint-{self.state.global_step}"
        first = self.args.should_save
        staging = atomic.staging(final) if first else nullcontext(atomic.staging_folder(final))
        try:
            with checkpoint.explain_failure(final), staging as self._staging:
                content = self._staging / final.name
                self.accelerator.wait_for_everyone()  # the first process has made the folder
                super()._save_checkpoint(model, trial)
                if first:
                    self.meter.save(content)
                    if isinstance(self.train_dataset, RecordedStream):
                        self.train_dataset.save(
                            content, self.state.global_step * self.get_total_train_batch_size(self.args)
                        )
                self.accelerator.wait_for_everyone()
                if first:
                    checkpoint.write_manifest(content)
                    atomic.publish(content, final)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if first:
            rotate_checkpoints(str(self.out), self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. A checkpoint of a divided model has its weights in parts, which the engine writes."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            self._save(output_dir, whole_weights(cast(nn.Module, self.model)))
        elif self.args.should_save:
            for part in (cast(Any, self.model).config, cast(Any, self.processing_class)):
                part.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # The engine pickles its arguments here. nestlearn reads no pickles; train_config.json has the settings.
        (Path(output_dir or self.out) / "training_args.bin").unlink(missing_ok=True)
