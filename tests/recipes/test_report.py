"""What a run says of its teachers at its end."""

import pytest

from composer_kd import EarlyStopDistillation, KnowledgeDistillation, TeacherSampling
from composer_kd.recipes.report import lines, teacher_share
from settings import teachers, train

SHARES = {
    'full': ([], {}, 1.0),
    'sampled': ([TeacherSampling()], {}, 1 / 4),
    'two_per_sample': ([TeacherSampling(2, per='sample')], {}, 1 / 2),
    'interval': ([], {'interval': 4}, 1 / 4),
    'stopped': ([EarlyStopDistillation('0.25dur')], {}, 1 / 4),
    'several': ([TeacherSampling(), EarlyStopDistillation('0.5dur')], {'interval': 2}, 1 / 16),
    'silent': ([], {'kd_weight': 0.0}, 0.0),
}


@pytest.mark.parametrize('name', SHARES)
def test_what_the_teachers_heard(name):
    algorithms, options, share = SHARES[name]
    run = train([*algorithms, distillation := KnowledgeDistillation(teachers(4), **options)])
    assert teacher_share(distillation.pool, run.state) == pytest.approx(share)


@pytest.mark.parametrize('share, said', [(None, ''), (1.0, ''), (0.25, '25.0%'), (0.0, '0.0%')])
def test_the_end_of_a_run_names_the_share(share, said, tmp_path):
    summary = {
        **{'run_name': 'x', 'epochs': 1, 'batches': 2, 'train_seconds': 3.0, 'teacher_seconds': 1.0, 'metrics': {}},
        **{'teacher_share': share, 'checkpoint': None},
    }
    (line,) = [line for line in lines(summary, tmp_path).splitlines() if 'teachers ' in line] or ['']
    assert line == (f'  teachers    heard {said} of what a full run hears' if said else '')
