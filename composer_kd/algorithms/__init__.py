"""Distillation as Composer Algorithms."""

from composer_kd.algorithms.codistillation import Codistillation
from composer_kd.algorithms.early_stop_distillation import EarlyStopDistillation
from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation
from composer_kd.algorithms.regularization_schedule import RegularizationSchedule
from composer_kd.algorithms.teacher_sampling import TeacherSampling

__all__ = [
    'Codistillation',
    'EarlyStopDistillation',
    'KnowledgeDistillation',
    'RegularizationSchedule',
    'TeacherSampling',
]
