"""transformers' Trainer and TRL's SFTTrainer with what a run needs on top: batches that resume exactly, exact loss."""

import math
import warnings
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

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


class ExactResumeTrainer(Trainer):
    """A Trainer whose runs are a function of seed and data alone, however often they are resumed or evaluated."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without touching the random state of training: a data loader draws a seed when it starts.

        Else a checkpoint that Ctrl-C saves before an evaluation was due would go on with other dropout masks.
        """
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

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
            raise InputError(f"optimizer: {' '.join(str(error).split())}") from error

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [len(ids) for ids in cast(Dataset, rows)["input_ids"]]
        return EpochSeededLengthGroups(batch, lengths, seed)


class CausalTrainer(ExactResumeTrainer, SFTTrainer):
    """SFTTrainer whose evaluation loss is the mean over all predicted tokens, and gives the perplexity.

    The stock loop averages the batches' means, so its loss depends on the batch size and on which texts share a batch.
    """

    _loss_sum: torch.Tensor
    _tokens: torch.Tensor

    def __init__(self, *, eval_dataset: Dataset, retained: Dataset | None = None, **kwargs: Any) -> None:
        # Given together, both are prepared for the model in the one way that SFTTrainer has.
        sets = eval_dataset if retained is None else {"test": eval_dataset, "retained": retained}
        super().__init__(eval_dataset=sets, **kwargs)
        self.retained: Dataset | None = None
        if retained is not None:
            prepared = cast(dict[str, Dataset], self.eval_dataset)
            self.eval_dataset, self.retained = prepared["test"], prepared["retained"]

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        outcome = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # Causal models predict token t + 1 at t, so the first label of a row is no target.
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(outcome[0].device)
        self._loss_sum += outcome[0].double() * tokens
        self._tokens += tokens
        return outcome

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
