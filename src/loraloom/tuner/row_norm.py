"""DoRA's norm ``||W + D||`` per row, computed once per version of the weights however many micro-batches use it.

On the CPU the norm is kept together with what it was computed from and compared by content, because version counters
miss edits through ``.data``: a stale norm would be a silent wrong result. The comparison costs O(r (in + out)), the
norm O(r in out). On an accelerator a comparison would make the host wait for the device in every layer. There each
forward computes the norm, and only ``||W||^2`` is kept, by the address and the version of W: an edit of a base weight
through ``.data`` is not seen there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraloom.update.terms import Term, fold
from loraloom.update.traced import is_traced
from loraloom.update.update import row_norm, squared_row_norm

_SAMPLES = 128  # entries of the base weight that are compared besides its address and version


class RowNormCache:
    """The norms of one adapter on one layer. Holds no parameters and appears in no state dict."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything; for the owner to call when it has changed the base weight."""
        self._base: tuple | None = None
        self._sample: Tensor | None = None
        self._squared: Tensor | None = None
        self._parts: list[Tensor] = []
        self._scalings: list[float] = []
        self._norm: Tensor | None = None

    @torch.no_grad()
    def __call__(self, parameter: Tensor | None, weight: Callable[[], Tensor], terms: Sequence[Term]) -> Tensor:
        """``rownorm(W + D)`` (out,), in at least float32, without gradient.

        Args:
            parameter: the stored base weight, possibly quantised; only its identity and some entries are looked at.
                None where there is no such tensor: then the norm is computed every time.
            weight: gives the base weight W (out, in); called when a norm has to be computed.
            terms: what D is the sum of.
        """
        if parameter is None or is_traced():  # a compiler would bake a cached norm into its graph
            return row_norm(weight(), *fold(terms))
        version = 0 if parameter.is_inference() else parameter._version  # inference tensors have none
        base = (parameter.data_ptr(), version, parameter.dtype, parameter.shape)
        if parameter.device.type != "cpu":
            W = weight()
            if base != self._base:
                self._base, self._squared = base, squared_row_norm(W)
            return row_norm(W, *fold(terms), self._squared)
        # An odd step, so that the entries do not all lie in one column.
        sample = parameter.detach().reshape(-1)[:: parameter.numel() // _SAMPLES | 1]
        if base != self._base or not torch.equal(sample, self._sample):  # type: ignore[arg-type]
            self._base, self._sample = base, sample.clone()
            self._squared = squared_row_norm(weight())
            self._norm = None
        parts = [part for term in terms for part in term[:4] if part is not None]
        scalings = [term.scaling for term in terms]
        if self._norm is None or scalings != self._scalings or not _equal(parts, self._parts):
            with torch.inference_mode(False), torch.no_grad():  # a norm cached while generating is used in training
                self._norm = row_norm(weight(), *fold(terms), self._squared)
            self._parts = [part.detach().clone() for part in parts]
            self._scalings = scalings
        return self._norm


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
