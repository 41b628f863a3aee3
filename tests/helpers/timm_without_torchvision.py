"""timm's Vision Transformer where torchvision is absent.

timm imports torchvision for its data loaders, which no test needs, and torchvision's wheels load
only beside the build of PyTorch they were made for. While timm is imported, names of a missing
torchvision stand for empty classes.
"""

import importlib.machinery
import importlib.util
import sys
import types


class _AnyAttribute(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Placeholder(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _Placeholders:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Placeholder(spec.name)

    def exec_module(self, module):
        pass


def vision_transformer_class():
    """Import ``timm`` and return its ``VisionTransformer``."""
    if importlib.util.find_spec("torchvision") is not None:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer
    placeholders = _Placeholders()
    sys.meta_path.append(placeholders)
    try:
        from timm.models.vision_transformer import VisionTransformer
    finally:
        sys.meta_path.remove(placeholders)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return VisionTransformer
