"""Maps of millions of images: shards that are computed on any number of machines, each of them once."""
