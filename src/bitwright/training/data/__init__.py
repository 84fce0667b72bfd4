"""Image sets by name, behind one interface for the training loop."""

from bitwright.training.data.dataset import Dataset
from bitwright.training.data.load import DATA, load_data

__all__ = ["DATA", "Dataset", "load_data"]
