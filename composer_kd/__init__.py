"""Train faster with MosaicML Composer by distillation."""

from composer_kd.algorithms import EarlyStopDistillation, KnowledgeDistillation, TeacherSampling
from composer_kd.teachers import NetworkTeacher, TeacherError, TeacherPool

__version__ = '0.1.0'

__all__ = [
    'EarlyStopDistillation',
    'KnowledgeDistillation',
    'NetworkTeacher',
    'TeacherError',
    'TeacherPool',
    'TeacherSampling',
]
