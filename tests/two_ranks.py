"""Run by Composer's launcher: trains every setting, and leaves the weights in a folder; then a teacher says NaN."""

import sys
from pathlib import Path

import torch
from composer.utils import dist

from composer_kd import KnowledgeDistillation, NetworkTeacher, TeacherError
from settings import CLASSES, save_everything, trainer

torch.set_num_threads(1)
save_everything(Path(sys.argv[1]))


class SaysNanOnRankOne(torch.nn.Module):
    def forward(self, images):
        return torch.full((len(images), CLASSES), float('nan') if dist.get_global_rank() == 1 else 0.0)


run = trainer([KnowledgeDistillation(NetworkTeacher(SaysNanOnRankOne()))])
try:
    run.fit()
except TeacherError as error:
    Path(sys.argv[1], f'rank{dist.get_global_rank()}.txt').write_text(str(error))
run.engine.close()
