"""The demo: draw datasets of pictures, and run a study on them with the small backbones in ``weights``."""
