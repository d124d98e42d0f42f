"Load a language model, read its states and write into them."

from importlib import import_module

_HOMES = {"load": "loading", "available_models": "loading", "LM": "lm", "Intervention": "interventions"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
