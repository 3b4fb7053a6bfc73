"""Broken twins: one change to the source of one module, made as it is imported."""

import importlib.abc
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutation"]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change that breaks a block.

    Parameters
    ----------
    name : :class:`str`
        What is wrong then, in a few words.
    module : :class:`str`
        Module whose source changes.
    old, new : :class:`str`
        Text that must be there exactly once, and what takes its place.
    """

    name: str
    module: str
    old: str
    new: str

    def source(self):
        """Source of the module with the change.

        Raises
        ------
        ValueError
            If the text is not there exactly once.
        """
        # Asking for the module itself would import the packages around it.
        package, *rest = self.module.split(".")
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        text = Path(folder, *rest).with_suffix(".py").read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"Mutation {self.name!r} must find its text once in {self.module},"
                f" but finds it {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)

    def install(self):
        """Make the change for the rest of this process.

        Raises
        ------
        RuntimeError
            If the module was imported already.
        """
        source = self.source()
        if self.module in sys.modules:
            raise RuntimeError(f"{self.module} was imported before it was broken")
        sys.meta_path.insert(0, _Finder(self.module, source))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module, source):
        self.module = module
        self.text = source

    def find_spec(self, fullname, path, target=None):
        if fullname != self.module:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module):
        exec(compile(self.text, f"<broken {self.module}>", "exec"), module.__dict__)
