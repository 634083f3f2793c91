"""Train faster with MosaicML Composer by distillation."""

from composer_kd.algorithms import EarlyStopDistillation, KnowledgeDistillation, TeacherSampling
from composer_kd.teachers import NetworkTeacher, TeacherError, TeacherPool

__all__ = [
    'EarlyStopDistillation',
    'KnowledgeDistillation',
    'NetworkTeacher',
    'TeacherError',
    'TeacherPool',
    'TeacherSampling',
]
