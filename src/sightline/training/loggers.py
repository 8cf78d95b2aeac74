"""Loggers by name: Lightning's for TensorBoard, CSV, W&B and MLflow, and one for trackio, which it does not have."""

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

PROJECT = "sightline"
"""Name of the project or experiment at trackers that have such."""


def check_logger(name: str | None) -> None:
    """Refuse a logger whose library is missing.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if name not in (None, "csv") and not find_spec(name):
        raise ModuleNotFoundError(f"watch.logger: {name} is not installed; install it: pip install {name}")


def create_logger(name: str | None, folder: Path) -> Any:
    """The logger of a run, which writes into its folder what it keeps on this machine.

    None: TensorBoard's, or no logger where that is not installed.

    Raises:
        ModuleNotFoundError: its library is not installed.
    """
    check_logger(name)
    if name is None:
        return create_logger("tensorboard", folder) if find_spec("tensorboard") else None
    if name == "tensorboard":
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    if name == "csv":
        from lightning.fabric.loggers.csv_logs import CSVLogger

        return CSVLogger(root_dir=folder, name="csv", version="", flush_logs_every_n_steps=1)
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project=PROJECT, name=folder.name, save_dir=folder)
    if name == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        server, here = os.environ.get("MLFLOW_TRACKING_URI"), folder.absolute() / "mlflow"
        if not server:
            here.mkdir(parents=True, exist_ok=True)
        return MLFlowLogger(
            experiment_name=PROJECT,
            run_name=folder.name,
            tracking_uri=server or f"sqlite:///{here}/mlflow.db",
            artifact_location=None if server else (here / "artifacts").as_uri(),
        )
    return TrackioLogger(folder.name)


class TrackioLogger:
    """What `log_metrics`, `log_image` and `finalize` of Lightning's loggers are, for trackio."""

    def __init__(self, name: str) -> None:
        trackio = self._trackio = import_module("trackio")
        self.experiment = trackio.init(project=PROJECT, name=name)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log figures at a step."""
        self._trackio.log(dict(metrics), step=step)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Log images (h, w, 3) at a step; it takes no lists, so those after the first get a number."""
        for number, image in enumerate(images):
            self._trackio.log({f"{key}-{number}" if number else key: self._trackio.Image(image)}, step=step)

    def finalize(self, status: str) -> None:
        """End the run."""
        self._trackio.finish()


def log_picture(logger: Any, name: str, picture: UInt8[Tensor, "3 h w"], step: int) -> bool:
    """Give a picture to a logger of Lightning or to one with its interface; False if it takes none.

    Weights & Biases, trackio: `logger.log_image`; TensorBoard: `add_image` of its experiment; MLflow: `log_image` of
    its experiment, which also gets the run.
    """
    pixels = picture.movedim(0, -1).cpu().numpy()
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[pixels], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        experiment.add_image(name, picture.cpu(), step)
        return True
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        experiment.log_image(logger.run_id, pixels, key=name.replace("/", "."), step=step)
        return True
    return False
