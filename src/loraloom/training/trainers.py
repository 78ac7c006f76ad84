"""The trainers of transformers and TRL with what a run needs on top.

Batches that resume exactly; evaluations that leave out no row and give the exact mean loss; the same gradients whether
a step is one batch, several micro-batches, or several processes' share.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOTrainer, SFTTrainer

from loraloom.errors import InputError


class EpochSeededLengthGroups(LengthGroupedSampler):
    """Batches of similar length whose order is a function of seed and epoch alone.

    The stock sampler draws from torch's global generator when the epoch's iterator is made; a run that resumes inside
    an epoch makes that iterator in another state, and would see other batches than the uninterrupted run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer's data loader at the start of every epoch."""
        self.generator.manual_seed(self.seed + epoch)


class ExactTrainer(Trainer):
    """A Trainer whose runs are a function of seed and data alone, however often they are resumed or evaluated.

    Args:
        test_dataset: what is evaluated before and after training; `eval_dataset` is what is evaluated meanwhile.
        optimizer_cls_and_kwargs: as Trainer's; not all of its subclasses take it.
    """

    def __init__(self, *, test_dataset: Any, optimizer_cls_and_kwargs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.test_dataset = test_dataset
        self._evaluating = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without touching the random state of training: a data loader draws a seed when it starts.

        Else a checkpoint that Ctrl-C saves before an evaluation was due would go on with other dropout masks.
        """
        with self._aside():
            return super().evaluate(*args, **kwargs)

    def forget_preparation(self) -> None:
        """Let training prepare the model as if no evaluation had come before it.

        An evaluation marks the model as prepared by accelerate, and a prepared model is not wrapped again: without this
        DDP would be left out, and each process would train on its own.
        """
        model: Any = self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they are prepared for evaluation and training at once
            return
        self.accelerator._models.clear()
        self.model_wrapped = model
        model._is_accelerate_prepared = False
        if (forward := model.__dict__.pop("_original_forward", None)) is not None:  # of mixed precision
            model.forward = forward

    def shard(self) -> None:
        """Shard model and optimizer, if FSDP is to: it takes them together, and an evaluation alone would not.

        Call it before the first evaluation, when the optimizer is made.
        """
        if not self.is_fsdp_enabled:
            return
        prepare = self.accelerator.prepare
        sharded = prepare(self.model, self.optimizer)
        self.model, self.optimizer = sharded
        self.model_wrapped = self.model

        accelerator: Any = self.accelerator

        def once(*objects: Any, **options: Any) -> Any:
            """Training prepares them again, and Accelerate would mix up the parameters whose shard here is empty."""
            if len(objects) != 2 or any(a is not b for a, b in zip(objects, sharded, strict=True)):
                return prepare(*objects, **options)
            accelerator._models.append(self.model)  # training has begun by forgetting both
            accelerator._optimizers.append(self.optimizer)
            return sharded

        accelerator.prepare = once

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the Trainer's.

        Raises:
            InputError: the optimizer would not honour an option, or the model trains nothing that one is for.
        """
        try:
            with warnings.catch_warnings():
                # The run prints a table of all that GaLore does and does not project.
                warnings.filterwarnings("ignore", message="GaLore: .* are not projected")
                return super().create_optimizer(model)
        except (ValueError, ModuleNotFoundError) as error:
            raise InputError(f"optimizer: {' '.join(str(error).split())}", code="optimizer") from error

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `evaluate`, with the predictions."""
        with self._aside():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """An evaluation that leaves no trace in the random state, and no weights whole that FSDP shards."""
        with torch.random.fork_rng(devices=[]):
            yield
        for module in cast(torch.nn.Module, self.model).modules() if self.is_fsdp_enabled else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with every row: `dataloader_drop_last` is about training."""
        with self._keeping_all_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with every row."""
        with self._keeping_all_rows():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _keeping_all_rows(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluating = True
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluating = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """As the Trainer's; None in an evaluation, whose batches' losses are means of their own."""
        return None if self._evaluating else super()._get_num_items_in_batch(batch_samples, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # The rows of a whole step, so that processes and accumulation only change who computes what.
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [len(ids) for ids in cast(Dataset, rows)["input_ids"]]
        return EpochSeededLengthGroups(batch, lengths, seed)


@contextmanager
def float32_kept(model: torch.nn.Module) -> Iterator[None]:
    """Keep trained float32 parameters as they are for the time of the block.

    TRL casts the adapters of a quantized base to bfloat16, where steps below 1/256 of a weight are lost to rounding.
    """
    own = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    yield
    for name, parameter in model.named_parameters():
        if name in own and parameter.dtype != torch.float32:
            parameter.data = own[name].to(parameter.device)


class HeadTrainer(ExactTrainer):
    """A Trainer of a head. The loss comes from `compute_loss_func`, and of an evaluation from `compute_metrics`."""


class ExactTokenLoss(ExactTrainer):
    """Evaluations whose loss is the mean over all predicted tokens.

    The stock loop averages the batches' means, so its loss depends on the batch size and on which texts share a batch.
    """

    shifted = 0
    """Labels at the start of a row that are no targets: causal models predict token t + 1 at t."""
    cuts_repeated_rows = True
    """False where a batch's rows are gathered, which needs as many of them in every process."""
    _loss_sum: torch.Tensor
    _tokens: torch.Tensor

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ):
        inputs = self._without_repeated_rows(inputs)
        outcome = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        tokens = (inputs["labels"][:, self.shifted :] != -100).sum().to(outcome[0].device)
        if not self._repeats_only:
            self._loss_sum += outcome[0].double() * tokens
            self._tokens += tokens
        return outcome

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without the rows that accelerate repeats, so that all processes have as many batches."""
        self._repeats_only = False
        state, size = self.accelerator.gradient_state, len(inputs["labels"])
        if (
            not self.cuts_repeated_rows
            or self.args.world_size == 1
            or not state.end_of_dataloader
            or state.remainder <= 0
        ):
            return inputs
        real = state.remainder - self.args.process_index * self.args.eval_batch_size
        self._repeats_only = real <= 0
        kept = size if real <= 0 else min(real, size)
        return {
            name: value[:kept] if isinstance(value, torch.Tensor) and len(value) == size else value
            for name, value in inputs.items()
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ):
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss_sum = self.accelerator.reduce(self._loss_sum, "sum").item()
        loss = loss_sum / self.accelerator.reduce(self._tokens, "sum").item()
        perplexity = math.exp(loss) if loss < 700 else math.inf
        exact = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity}
        return output._replace(metrics={**(output.metrics or {}), **exact})


class CausalTrainer(ExactTokenLoss, SFTTrainer):
    """SFTTrainer whose evaluation loss is exact, and gives the perplexity."""

    shifted = 1

    def __init__(
        self, *, eval_dataset: Dataset, test_dataset: Dataset, retained: Dataset | None = None, **kwargs: Any
    ) -> None:
        # Given together, all are prepared for the model in the one way that SFTTrainer has.
        sets = {"eval": eval_dataset, "test": test_dataset} | ({} if retained is None else {"retained": retained})
        with float32_kept(kwargs["model"]):
            super().__init__(eval_dataset=sets, test_dataset=None, **kwargs)
        prepared = cast(dict[str, Dataset], self.eval_dataset)
        self.eval_dataset, self.test_dataset = prepared["eval"], prepared["test"]
        self.retained: Dataset | None = prepared.get("retained")


class WritingTrainer(ExactTokenLoss, Seq2SeqTrainer):
    """Seq2SeqTrainer, which generates in evaluations, with an exact loss."""

    cuts_repeated_rows = False


class PreferenceTrainer(ExactTrainer, DPOTrainer):
    """DPOTrainer whose evaluations return the share of pairs that the model ranks rightly, and by how much.

    The reference is the model without its adapter. TRL's is a copy of the adapter as it is given, which costs memory,
    is saved with it, and makes the reference of a trained adapter that is evaluated again the adapter itself.
    """

    def __init__(self, *, eval_dataset: Dataset, test_dataset: Dataset, **kwargs: Any) -> None:
        sets = {"eval": eval_dataset, "test": test_dataset}
        with float32_kept(kwargs["model"]):
            super().__init__(eval_dataset=sets, test_dataset=None, **kwargs)
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        prepared = cast(dict[str, Dataset], self.eval_dataset)
        self.eval_dataset, self.test_dataset = prepared["eval"], prepared["test"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ):
        # The loss and the rewards are all that is reported, and logits of every pair would not fit into memory.
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        gathered = self._metrics["eval"]
        names = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
        means = {f"{metric_key_prefix}_{ours}": _mean(gathered[name]) for ours, name in names.items()}
        return output._replace(metrics={**(output.metrics or {}), **means})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
