"""Where a teacher's signal comes from."""

from composer_kd.teachers.network import NetworkTeacher
from composer_kd.teachers.pool import TeacherPool
from composer_kd.teachers.recorded import RecordedTeacher
from composer_kd.teachers.recording import RecordingTeacher
from composer_kd.teachers.teacher import Signal, Teacher, TeacherError, logits_of
from composer_kd.teachers.weights import load_weights

__all__ = [
    'NetworkTeacher',
    'RecordedTeacher',
    'RecordingTeacher',
    'Signal',
    'Teacher',
    'TeacherError',
    'TeacherPool',
    'load_weights',
    'logits_of',
]
