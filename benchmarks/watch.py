"""How often does the warning of `watch` find a shortcut, and how often does it warn without one?

The same small network with attention learns 2,000 images of `clutter-shortcut`, whose class a patch in a corner gives
away, and of `clutter`, where nothing does; the masks are those of the digit. Each method is judged alone.

    python benchmarks/watch.py --seeds 10,11,12
"""

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
from measure import save

import sightline as sl
from sightline.recipe import Data, Model, Optim, Recipe, Watch
from sightline.training import watch

fitting = import_module("sightline.training.fit")  # its function has the same name

METHODS = ("grad_cam", "attention", "activation_map", "saliency")
SETS = ("clutter-shortcut", "clutter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="10,11,12", help="of weights, order and images")
    parser.add_argument("--epochs", type=int, default=5, help="of 62 steps")
    options = parser.parse_args()
    rows = []
    for seed in map(int, options.seeds.split(",")):
        for source in SETS:
            judged = {method: 0 for method in METHODS}
            looks = []

            class Alone(watch.Watcher):
                def judge(self, look, accuracy=None, judged=judged, looks=looks):
                    alone = {method: {method: one} for method, one in look.shares.items()}
                    for method, shares in alone.items():
                        seen, self.seen = self.seen, [(a, {method: s[method]}) for a, s in self.seen]
                        if len(seen) and not judged[method] and self._sentence(look._replace(shares=shares), accuracy):
                            judged[method] = len(seen)  # the look before training has number 0
                        self.seen = seen
                    looks.append({method: float(np.nanmean(one)) for method, one in look.shares.items()})
                    self.seen.append((look.chance if accuracy is None else accuracy, look.shares))
                    return ""

            recipe = Recipe(
                data=Data(source=source, mask="digit", train_size=2000, seed=seed),
                model=Model(
                    name="cifar_resnet",
                    options={"depth": 8, "stem_stride": 2, "high_resolution": 1, "attention": "ltpa"},
                ),
                optim=Optim(epochs=options.epochs, lr=0.006),
                watch=Watch(every=1, methods=METHODS, logger="csv"),
                seeds=(seed,),
            )
            with tempfile.TemporaryDirectory() as folder, patch.object(fitting, "Watcher", Alone):
                run = sl.fit(recipe, Path(folder, "run"), progress=False)
            accuracies = [row["val_accuracy"] for row in run.history]
            rows.append({"data": source, "seed": seed, "warned in epoch": judged, "val": accuracies, "in mask": looks})
            print(source, seed, judged, f"{accuracies[-1]:.3f}", flush=True)
            save("watch", rows)


if __name__ == "__main__":
    main()
