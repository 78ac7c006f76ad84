"""``open_adapter``: an adapter on disk or in a model, checked once, so that every verb gives the same answer to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.adapter.base import BaseWeights
from loraloom.adapter.findings import Finding, base_findings, config_findings, name_findings
from loraloom.adapter.peft_features import changed_base
from loraloom.adapter.protocol import Adapter
from loraloom.adapter.stored import StoredAdapter, read_adapter
from loraloom.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


def open_adapter(source: "str | Path | tuple[PeftModel, str] | Adapter", base: str | Path | None = None) -> Any:
    """Opens an adapter: what it is made of module by module, read when it is asked for.

    Args:
        source: a folder or a repository of the hub; a PeftModel and the name of one of its adapters; or an adapter that
            is open already.
        base: folder or repository of the base model, for an adapter on disk: its weights can then be asked for.

    Returns:
        A :class:`~loraloom.adapter.stored.StoredAdapter` or a :class:`~loraloom.adapter.live.LiveAdapter`.

    Raises:
        InputError: a file is missing or broken; names, shapes, ranks and configuration contradict each other; the
            adapter makes a function that is not understood, or changed its base. ``loraloom inspect`` says more.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, tuple):
        from loraloom.adapter.live import LiveAdapter  # takes PEFT

        return LiveAdapter(*source)
    return open_stored(source, base)


def open_stored(path_or_id: str | Path, base: str | Path | None = None) -> StoredAdapter:
    """:func:`open_adapter` of a folder or a repository of the hub."""
    adapter = read_adapter(path_or_id)
    if why := changed_base(adapter.config):
        raise InputError(f"{adapter.where}: {why}", code="altered-base")
    _require(adapter, name_findings(adapter) + config_findings(adapter))
    if base is not None:
        adapter.base = BaseWeights(base, adapter)
        _require(adapter, base_findings(adapter, adapter.base))
    return adapter


def _require(adapter: StoredAdapter, findings: list[Finding]) -> None:
    for finding in findings:
        if finding.level == "error":
            raise InputError(f"{adapter.where}: {finding.message} (see loraloom inspect)", code=finding.code)
