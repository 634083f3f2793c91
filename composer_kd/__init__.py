"""Train faster with MosaicML Composer by distillation."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_kd.algorithms import (
        Codistillation,
        EarlyStopDistillation,
        KnowledgeDistillation,
        RegularizationSchedule,
        TeacherSampling,
    )
    from composer_kd.teachers import NetworkTeacher, RecordedTeacher, TeacherError, TeacherPool

__version__ = '0.1.0'

__all__ = [
    'Codistillation',
    'EarlyStopDistillation',
    'KnowledgeDistillation',
    'NetworkTeacher',
    'RecordedTeacher',
    'RegularizationSchedule',
    'TeacherError',
    'TeacherPool',
    'TeacherSampling',
]


def __getattr__(name: str) -> Any:
    # When they are asked for: Composer takes seconds to import, and a mistyped command should not wait for it.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    room = 'teachers' if name in ('NetworkTeacher', 'RecordedTeacher', 'TeacherError', 'TeacherPool') else 'algorithms'
    return getattr(importlib.import_module(f'{__name__}.{room}'), name)
