"""Images whose decoder ends its process or never ends, in processes that were sent a `Deadly`."""

import os
import time
from typing import Any

from PIL import Image, ImageFile

from sightline.data import Preprocess


class Deadly(Preprocess):
    """Teaches Pillow the format where it is unpickled, so not in the process of the tests."""

    def __reduce__(self) -> Any:
        return _taught, (self.size, self.mean, self.std)


def _taught(size: Any, mean: Any, std: Any) -> Preprocess:
    Image.register_open("DEADLY", _DeadlyImage, lambda head: head.startswith(b"DEADLY"))
    Image.register_extension("DEADLY", ".deadly")
    return Deadly(size=size, mean=mean, std=std)


class _DeadlyImage(ImageFile.ImageFile):
    format = "DEADLY"

    def _open(self) -> None:
        self._size, self._mode = (8, 8), "RGB"

    def load(self) -> None:
        if b"slow" in self.fp.read():
            time.sleep(600)
        os._exit(1)


class Unready(Preprocess):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)
