"""An adapter that is computed: modules whose factors are made when they are asked for, and kept.

What `combine`, `shrink` and `extract` make, for :mod:`loraloom.export` to write, read back and compare.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from loraloom.adapter.protocol import AdaptedModule, Adapter, Parts
from loraloom.errors import InputError

Make = Callable[[], tuple[Tensor, Tensor]]


class MadeModule(AdaptedModule):
    """A module with the update ``B A``.

    Args:
        name: of the module.
        make: gives A (r, in) and B (out, r); called once.
        kernel: of a convolution: its in channels and kernel, by which A is (r, *kernel); () for matrices.
        embedding: whether the module is a table of vectors.
    """

    scaling = 1.0

    def __init__(self, name: str, make: Make, kernel: tuple[int, ...] = (), embedding: bool = False) -> None:
        self.name = name
        self._make, self._kernel, self._embedding = make, kernel, embedding
        self._parts: Parts | None = None

    def unchecked_parts(self) -> Parts:
        if self._parts is None:
            A, B = self._make()
            if self._kernel:
                A, B = A.reshape(-1, *self._kernel), B.reshape(*B.shape, *[1] * (len(self._kernel) - 1))
            self._parts = {"A": A.contiguous(), "B": B.contiguous()}
        return self._parts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {part: tuple(tensor.shape) for part, tensor in self.unchecked_parts().items()}

    @property
    def where(self) -> str:
        return self.name

    @property
    def embedding(self) -> bool:
        return self._embedding

    def weight(self) -> Tensor:
        raise InputError(f"{self.name}: the base model is not known here", code="no-base")


class MadeAdapter(Adapter):
    """An adapter of type LORA made of such modules.

    Args:
        where: how messages name it.
        modules: in their order.
        config: what the written adapter_config.json takes over: task_type, base_model_name_or_path, revision,
            fan_in_fan_out.
        sha256: of what it was made from.
        beside: an adapter whose heads, biases and tokens the made one has too.
    """

    kind = "LORA"

    def __init__(
        self,
        where: str,
        modules: Mapping[str, MadeModule],
        config: Mapping[str, Any],
        sha256: str,
        beside: Adapter | None = None,
    ) -> None:
        self.where, self.modules, self.sha256 = where, modules, sha256
        self._beside = beside
        kept = ["task_type", "base_model_name_or_path", "revision", "fan_in_fan_out"]
        kept += ["bias", "modules_to_save", "trainable_token_indices"] if beside is not None else []
        self.config = {"peft_type": "LORA"} | {key: config[key] for key in kept if key in config}

    @property
    def others(self) -> list[str]:
        return [] if self._beside is None else self._beside.others

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(()) if self._beside is None else self._beside.other_tensors()


class MadeReport:
    """What the reports of the verbs that make adapters share; they are dataclasses.

    Attributes:
        path: the new folder.
        errors: relative error by module.
    """

    path: str
    errors: dict[str, float]

    @property
    def worst(self) -> str:
        """The module with the largest error."""
        return max(self.errors, key=lambda module: self.errors[module])

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)  # type: ignore[call-overload]  # every report is a dataclass


def check_no_magnitude(modules: Mapping[str, AdaptedModule], where: str, verb: str) -> None:
    """Raises InputError where an update is more than ``s B M A`` of one matrix: DoRA's magnitude, a bias, experts."""
    for name, module in modules.items():
        if module.expert is not None:
            raise InputError(
                f"{where}: {name} is one of the experts of {module.expert.parameter}, which {verb} does not take; "
                "loraloom merge does",
                code="experts",
            )
        for part, what in (("magnitude", "a DoRA magnitude"), ("bias", "a bias"), ("member_bias", "biases of members")):
            if part in module.shapes():
                raise InputError(
                    f"{where}: {name} has {what}, which is no product B A: {verb} takes low-rank updates alone; "
                    "loraloom merge takes all",
                    code=part,
                )
