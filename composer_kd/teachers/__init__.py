"""Where a teacher's signal comes from."""

from composer_kd.teachers.network import NetworkTeacher
from composer_kd.teachers.pool import TeacherPool
from composer_kd.teachers.teacher import Teacher, TeacherError, logits_of
from composer_kd.teachers.weights import load_weights

__all__ = ['NetworkTeacher', 'Teacher', 'TeacherError', 'TeacherPool', 'load_weights', 'logits_of']
