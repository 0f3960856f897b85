"""Generators and discriminators."""

from fastgan.models.sagan import SAGANDiscriminator, SAGANGenerator, check_labels

__all__ = ["SAGANDiscriminator", "SAGANGenerator", "check_labels"]
