"""Ranks for a run that is still to come: its model, its rows, its loss, a few batches of them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import set_seed

from loraloom.errors import InputError
from loraloom.progress import Progress, silent
from loraloom.ranks.ranks import RankReport, check_budget, suggest_ranks
from loraloom.training.config import RunConfig
from loraloom.training.data import load_data
from loraloom.training.model import load_base, load_processor, resolve_max_length
from loraloom.training.prepare import build_trainer, prepare_setup, training_arguments


def ranks_for_run(config: RunConfig, batches: int = 8, *, progress: Progress = silent, **options: Any) -> RankReport:
    """:func:`loraloom.ranks.ranks.suggest_ranks` with the model, the training rows and the loss of a run.

    The batches are those of training, of `training.per_device_train_batch_size` rows each. A head that the checkpoint
    does not have starts at random, as in training, from `training.seed`.

    Args:
        config: the run; nothing of it is trained or written.
        batches: how many.
        progress: is told of the batches, then of the matrices.
        **options: of :func:`suggest_ranks`: rank, parameters, max_rank.

    Raises:
        InputError: something in the configuration or in the data is wrong, or the model is quantised.
    """
    check_budget(**options)
    if batches < 1:
        raise InputError(f"batches={batches}: expected a positive integer", code="no-batch")
    set_seed(config.training["seed"])
    processor = load_processor(config.model)
    max_length = resolve_max_length(config, processor)
    data = load_data(config.data, config.model.task)
    arguments = training_arguments(config, max_length, validates=data.validation is not None)
    setup = prepare_setup(config, processor, data, None, max_length)
    model, _ = load_base(config.model, data, processor)
    trainer: Any = build_trainer(setup, arguments, model, [])

    def inputs() -> Iterator[Any]:
        loader = trainer.get_train_dataloader()
        count = min(batches, len(loader))
        for done, batch in enumerate(islice(loader, count)):
            progress("Taking gradients", done, count)
            yield batch
        progress("Taking gradients", count, count)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return trainer.compute_loss(model, trainer._prepare_inputs(batch))

    try:
        return suggest_ranks(trainer.model, inputs(), loss=loss, progress=progress, **options)
    except ValueError as error:
        raise InputError(str(error), code=getattr(error, "code", "ranks")) from error
