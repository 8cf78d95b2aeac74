"""Names of pytorch-grad-cam that have nothing behind them here: they can be imported, and say so when they are used."""

from typing import Any, NoReturn


def absent(name: str, instead: str) -> type:
    """A class of that name that cannot be created."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} of pytorch-grad-cam is not in sightline; {instead}")

    return type(name, (), {"__init__": refuse, "__doc__": f"Not in sightline; {instead}."})
