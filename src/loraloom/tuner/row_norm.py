"""DoRA's norm ``||W + D||`` per row, computed once per version of the weights however many micro-batches use it.

On the CPU the norm is kept together with what it was computed from. A version counter that has moved says that it is
stale. One that has not says nothing, as it misses edits through ``.data`` and a stale norm would be a silent wrong
result: then the content is compared, which costs O(r (in + out)), the norm O(r in out). On an accelerator a comparison
would make the host wait for the device in every layer. There each forward computes the norm, and only ``||W||^2`` is
kept, by the address and the version of W: an edit of a base weight through ``.data`` is not seen there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraloom.update.one_pass import MakeNorm
from loraloom.update.terms import Term
from loraloom.update.traced import is_traced
from loraloom.update.update import row_norm_of, squared_row_norm

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
        self._versions: list[tuple[int, int]] = []
        self._scalings: list[float] = []
        self._norm: Tensor | None = None

    def __call__(self, parameter: Tensor | None, weight: Callable[[], Tensor], terms: Sequence[Term]) -> Tensor:
        """``rownorm(W + D)`` (out,), in at least float32, without gradient.

        Args:
            parameter: the stored base weight, possibly quantised; only its identity and some entries are looked at.
                None where there is no such tensor: then the norm is computed every time.
            weight: gives the base weight W (out, in); called when a norm has to be computed.
            terms: what D is the sum of.
        """
        norm = self.lazily(parameter, weight, terms)
        return norm if isinstance(norm, Tensor) else norm(None)

    @torch.no_grad()
    def lazily(
        self, parameter: Tensor | None, weight: Callable[[], Tensor], terms: Sequence[Term]
    ) -> Tensor | MakeNorm:
        """The same, or where it has to be computed a function that does so, which may be given ``W A^T`` (out, r)."""
        if parameter is None or is_traced():  # a compiler would bake a cached norm into its graph
            return row_norm_of(weight(), terms)
        base = (*_place(parameter), parameter.dtype, parameter.shape)
        if parameter.device.type != "cpu":
            W = weight()
            if base != self._base:
                self._base, self._squared = base, squared_row_norm(W)
            return row_norm_of(W, terms, self._squared)
        # An odd step, so that the entries do not all lie in one column.
        step = parameter.numel() // _SAMPLES | 1
        sample = parameter.view(-1)[::step] if parameter.is_contiguous() else parameter.reshape(-1)[::step]
        if base != self._base or not torch.equal(sample, self._sample):  # type: ignore[arg-type]
            self._base, self._sample = base, sample.clone()
            self._squared = squared_row_norm(weight())
            self._norm = None
        parts = [part for term in terms for part in term[:4] if part is not None]
        versions, scalings = [_place(part) for part in parts], [term.scaling for term in terms]
        if self._norm is not None and scalings == self._scalings and not _changed_in_place(self._versions, versions):
            self._versions = versions
            if _equal(parts, self._parts):
                return self._norm
        self._versions, self._scalings, self._norm = versions, scalings, None

        def compute(W_A: Tensor | None) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():  # a norm cached while generating is used in training
                self._norm = row_norm_of(weight(), terms, self._squared, W_A)
                self._parts = [part.clone() for part in parts]
            return self._norm

        return compute


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address and version; a tensor made in inference mode has no version."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _changed_in_place(before: list[tuple[int, int]], now: list[tuple[int, int]]) -> bool:
    return any(b != n and b[0] == n[0] for b, n in zip(before, now, strict=False))


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
