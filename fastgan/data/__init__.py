"""Labeled image sets, their splits, and a loader that keeps them on the device."""

from fastgan.data.datasets import DataSplit, digits, load_data
from fastgan.data.folders import image_folder, sketch_folder
from fastgan.data.images import LabeledImages, as_float, stratified_split
from fastgan.data.loader import SKETCHES, Batch, DeviceLoader, StreamLoader, edge_map, sketches_of
from fastgan.data.photographs import photos

__all__ = [
    "SKETCHES",
    "Batch",
    "DataSplit",
    "DeviceLoader",
    "LabeledImages",
    "StreamLoader",
    "as_float",
    "digits",
    "edge_map",
    "image_folder",
    "load_data",
    "photos",
    "sketch_folder",
    "sketches_of",
    "stratified_split",
]
