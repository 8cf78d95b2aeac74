"""Some of captum 0.9 over `sightline.explain`: in an old script, replace `captum` by `sightline.compat.captum`."""
