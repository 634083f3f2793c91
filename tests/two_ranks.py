"""Run by Composer's launcher: trains every setting, and leaves the weights in a folder."""

import sys
from pathlib import Path

import torch

from settings import save_everything

torch.set_num_threads(1)
save_everything(Path(sys.argv[1]))
