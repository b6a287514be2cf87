"""Training data: WebDataset shards, read in a keyed order through DALI or plain PyTorch."""

from dmd2_fast.data.batch import Batch
from dmd2_fast.data.digits import prepare_digits
from dmd2_fast.data.loader import Loader, dali_installed, make_loader, read_all

__all__ = ["Batch", "Loader", "dali_installed", "make_loader", "prepare_digits", "read_all"]
