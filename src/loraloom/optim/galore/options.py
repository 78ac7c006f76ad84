"""Which options of GaLore go together."""

import torch.distributed as dist

from loraloom.optim.galore.bases import Side, sides_of


def check_options(
    refresh: str,
    side: Side,
    *,
    residual: bool,
    rotate_moments: bool,
    layerwise: bool,
    max_grad_norm: float | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    """Raise ValueError, as `GaLore` documents it, unless the options go together."""
    if refresh not in ("subspace", "svd", "random"):
        raise ValueError(f"refresh={refresh!r} is unknown; use 'subspace', 'svd' or 'random'")
    whole = "residual=True" if residual else "refresh='random'" if refresh == "random" else ""
    if whole and (layerwise or process_group is not None):
        other = "layerwise=True" if layerwise else "process_group"
        raise ValueError(f"{whole} needs the whole gradient at the step, which {other} never has; leave one out")
    if refresh == "random" and (residual or rotate_moments):
        other = "residual" if residual else "rotate_moments"
        raise ValueError(f"refresh='random' does not use {other}=True; leave one of them out")
    if max_grad_norm is not None and not layerwise:
        raise ValueError(f"max_grad_norm={max_grad_norm} is for layerwise=True; clip with clip_grad_norm_ instead")
    if layerwise and process_group is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"layerwise=True on {dist.get_world_size()} processes frees gradients before DistributedDataParallel "
            "averages them; pass process_group=torch.distributed.group.WORLD and do not wrap the model"
        )
    sides_of(side, (1, 1))
