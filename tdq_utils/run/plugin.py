"""Plug :mod:`tdq_utils.run.hosting` into diffusers as soon as diffusers is there, without importing it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HOST = "diffusers.models.modeling_utils"  # whatever loads or saves a model imports it
PLUGIN = "tdq_utils.run.hosting"


class _Announcer(MetaPathFinder):
    """Finds one module as Python does, and has the plug-in imported when that module has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == HOST else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), import_module(PLUGIN))  # type: ignore
        return spec


if HOST in sys.modules:
    import_module(PLUGIN)
else:
    sys.meta_path.insert(0, _Announcer())
