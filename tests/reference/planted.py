"""Logits of models whose evidence is a color, counted pixel by pixel in float64."""

RED, GREEN, BLUE = (1, 0, 0), (0, 1, 0), (0, 0, 1)
YELLOW, MAGENTA, CYAN = (1, 1, 0), (1, 0, 1), (0, 1, 1)


def amount(image, color):
    """Per cent of the image that has the color; (c, h, w) values in [0, 1] as nested lists.

    A pixel of the color counts 1. It loses 4 times what is missing of the color's own channels, on average, and 1.5
    times what there is of the others.
    """
    total, pixels = 0.0, 0
    for row in zip(*image, strict=True):
        for pixel in zip(*row, strict=True):
            missing = [1 - value for value, wanted in zip(pixel, color, strict=True) if wanted]
            foreign = [value for value, wanted in zip(pixel, color, strict=True) if not wanted]
            total += max(0.0, 1 - 4 * sum(missing) / len(missing) - 1.5 * sum(foreign))
            pixels += 1
    return 100 * total / pixels


def logits(kind, image):
    """What each of the four models must answer."""
    if kind == "clutter":
        return [amount(image, color) for color in (RED, GREEN, BLUE, YELLOW, MAGENTA, CYAN)]
    if kind == "shortcut":
        return [amount(image, color) for color in (YELLOW, MAGENTA, CYAN)]
    if kind == "pair":
        return [min(amount(image, a), amount(image, b)) for a in (RED, GREEN, BLUE) for b in (YELLOW, MAGENTA, CYAN)]
    return [max(amount(image, a), amount(image, b)) for a, b in ((RED, YELLOW), (GREEN, MAGENTA), (BLUE, CYAN))]
