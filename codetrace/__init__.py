"""Does a code model know what its program does?

The names below are the ones to start with; each is imported when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load": "models.loading",
    "LM": "models.lm",
    "Program": "tasks.programs",
    "load_problems": "tasks.problems",
    "grade": "sandbox.pool",
    "SAE": "sae.sae",
    "quick_experiment": "phases.tracking",
    "ExperimentRunner": "phases.tracking",
    "execute_phase": "runs.execute",
    "newest_run": "runs.manifest",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
