"""Which weights a model reads itself instead of calling their module.

An adapter computes in the forward pass of its module. Where a model takes ``self.dt_proj.weight`` (Mamba's kernels,
WavLM's attention, nn.MultiheadAttention) that pass never happens, and the adapter would do nothing. So the sources of
the model's classes are searched: every method that ``forward`` can reach, for an expression ``self.<path>.weight``
whose value is used. Reads of the dtype, the device or the shape do not count.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_ABOUT_THE_TENSOR = {"dtype", "device", "shape", "size", "dim", "is_cuda", "is_meta", "requires_grad", "numel", "ndim"}


def modules_read(model: nn.Module) -> set[str]:
    """Names of the modules whose weight another module's forward pass reads.

    Args:
        model: any model; only the sources of its classes are looked at. A class without a source reads nothing.
    """
    return {
        f"{name}.{path}" if name else path
        for name, module in model.named_modules()
        for path in _paths_read(type(module))  # type: ignore[arg-type]
        if _has(module, path)
    }


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


@cache
def _paths_read(cls: type) -> frozenset[str]:
    """The paths below ``self`` whose weight the class's forward pass uses."""
    found: set[str] = set()
    queue, seen = ["forward"], set()
    while queue:
        name = queue.pop()
        seen.add(name)
        if (method := _method(cls, name)) is not None:
            found |= set(_weights(method))
            queue += [called for called in _attributes_of_self(method) if called not in seen]
            seen.update(queue)
    return frozenset(found)


@cache
def _method(cls: type, name: str) -> ast.FunctionDef | None:
    owner = next((c for c in cls.__mro__ if name in vars(c)), None)
    if owner is None or owner is nn.Module:
        return None
    function = inspect.unwrap(vars(owner)[name]) if callable(vars(owner)[name]) else None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):  # no source: built in, made at run time, or no function
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _weights(method: ast.FunctionDef) -> Iterator[str]:
    idle = {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Attribute) and _is_question(node)}
    for call in ast.walk(method):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "hasattr"):
            idle |= {id(argument) for argument in call.args}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, method)
            if path and id(node) not in idle:
                yield path


def _is_question(node: ast.Attribute) -> bool:
    return node.attr in _ABOUT_THE_TENSOR


def _path(node: ast.expr, method: ast.FunctionDef) -> str:
    """``a.b`` for the expression ``self.a.b``, "" for another."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    self_name = method.args.args[0].arg if method.args.args else None
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == self_name else ""


def _attributes_of_self(method: ast.FunctionDef) -> set[str]:
    return {
        node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute) and _path(node, method) == node.attr
    }
