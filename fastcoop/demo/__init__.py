"""The demo: draws datasets of pictures and runs a study on them with small backbones of its own."""
