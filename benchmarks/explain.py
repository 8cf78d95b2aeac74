"""Three maps from one call beside one plain forward: grad_cam, activation_map and cam of ResNet-50 at 224 px, batch 16.

The weights are random: the time of a map does not depend on what the net has learned.
"""

import timm
import torch
from measure import pairs, save

import sightline as sl

METHODS = ("grad_cam", "activation_map", "cam")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = timm.create_model("resnet50").eval()
    images = torch.randn(16, 3, 224, 224)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    ratio = pairs(lambda: sl.explain(model, images, methods=METHODS), plain)
    what = "grad_cam + activation_map + cam / one forward, resnet50, 224 px, batch 16, cpu, 2 threads, automatic layer"
    print(f"three maps / forward {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  A/A {ratio.aa:.3f}  bar 1.10")
    print(save("explain", [{"what": what, **ratio._asdict(), "bar": 1.10}]))


if __name__ == "__main__":
    main()
