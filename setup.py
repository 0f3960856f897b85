"""Package layout: kernels/ is installed as fastgan.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgan", "fastgan.*"]), "fastgan.kernels"],
    package_dir={"fastgan.kernels": "kernels"},
)
