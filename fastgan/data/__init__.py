"""Labelled image sets, their splits, and a loader that keeps them on the device."""

from fastgan.data.digits import digits
from fastgan.data.folders import image_folder, sketch_folder
from fastgan.data.images import LabelledImages, as_float, stratified_split
from fastgan.data.loader import SKETCHES, Batch, DeviceLoader, sketches_of
from fastgan.data.sketches import edge_map
from fastgan.data.sources import DataSplit, load_data

__all__ = [
    "SKETCHES",
    "Batch",
    "DataSplit",
    "DeviceLoader",
    "LabelledImages",
    "as_float",
    "digits",
    "edge_map",
    "image_folder",
    "load_data",
    "sketch_folder",
    "sketches_of",
    "stratified_split",
]
