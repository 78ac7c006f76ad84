"""Modules that are not there, for loaders that import much and use little.

A stub has every attribute: a name in capitals is False, one that starts with a capital is a class that does nothing,
any other a function that returns its argument where that is a function (a decorator), and something falsy otherwise.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, ClassVar


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Something()

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: Any) -> Any:
        return cls


class Something:
    """Falsy, callable, iterable, and whatever attribute is asked for."""

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else Something()

    def __iter__(self) -> Any:
        return iter(())

    def __getitem__(self, key: Any) -> Any:
        return Something()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Something()

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__


class _Module(types.ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.isupper() or not name[0].isupper():
            value: Any = False if name.isupper() else Something()
        else:
            value = _Meta(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, real: tuple[str, ...], missing: tuple[str, ...]) -> None:
        self.package, self.real, self.missing = package, real, missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        own = name == self.package or name.startswith(f"{self.package}.")
        stubbed = own and not any(f"{kept}.".startswith(f"{name}.") or name == kept for kept in self.real)
        if stubbed or name.partition(".")[0] in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(folder: str, package: str, real: tuple[str, ...], missing: tuple[str, ...] = ()) -> None:
    """Makes a package importable of which only some modules are real.

    Args:
        folder: where the wheel was unpacked.
        package: its name.
        real: its modules that are taken from there, and what is above them without running it.
        missing: other packages to stub.
    """
    sys.meta_path.insert(0, _Finder(package, real, missing))
    # What is above a real module is a namespace: its own __init__ would import the server.
    for name in sorted({".".join(kept.split(".")[:n]) for kept in real for n in range(1, kept.count(".") + 1)}):
        if name not in real:
            module = _Module(name)
            module.__path__ = [f"{folder}/{name.replace('.', '/')}"]
            sys.modules[name] = module
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
