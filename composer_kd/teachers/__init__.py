"""Where a teacher's signal comes from."""

from composer_kd.teachers.network import NetworkTeacher
from composer_kd.teachers.pool import TeacherPool
from composer_kd.teachers.teacher import Teacher, TeacherError, logits_of
from composer_kd.teachers.weights import file_sha256, load_weights

__all__ = ['NetworkTeacher', 'Teacher', 'TeacherError', 'TeacherPool', 'file_sha256', 'load_weights', 'logits_of']
