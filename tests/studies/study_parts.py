"""Small recipes for studies, and processes that start in no time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

POPEN = subprocess.Popen

STUDENT = """\
seed: 17
max_duration: 3ba
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: fashion_mnist, split: train, synthetic: true, subset: 96, augment: true, views: 2, batch_size: 32,
  shuffle_seed: '${seed}'}
eval_data: {name: fashion_mnist, split: test, synthetic: true, subset: 100, batch_size: 100}
optimizer: {name: sgd, lr: 0.1}
save_interval: 1ba
device: cpu
"""
KD = 'algorithms: {knowledge_distillation: {temperature: 2.0}}\n'
RECIPES = {
    'base.yaml': STUDENT,
    'teacher.yaml': STUDENT.replace('width: 2', 'width: 4'),
    'kd.yaml': STUDENT + 'teachers: [{name: network, recipe: teacher.yaml}]\n' + KD,
    'recorded.yaml': STUDENT + 'teachers: [{name: recorded, path: nowhere}]\n' + KD,
}
METRIC = 'metrics/eval/MulticlassAccuracy'


def write_recipes(folder='recipes'):
    Path(folder).mkdir()
    for name, text in RECIPES.items():
        Path(folder, name).write_text(text)


class ForkedLauncher:
    """In place of `subprocess.Popen`: does what is asked of Python, in a forked process.

    This one has imported everything, so that each lives for no longer than its work takes. It must not train: torch's
    threads do not survive a fork.
    """

    def __init__(self, command, *, stdout, stderr, env, start_new_session):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._work(command[1:], stdout.fileno(), env))

    def _work(self, arguments, log, env):
        from composer_kd import cli

        os.setsid()
        subprocess.Popen = POPEN
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(1, 'w', buffering=1)
        code = cli.main(arguments[2:]) if arguments[0] == '-m' else cli.run_recipe(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code

    def poll(self):
        if self.returncode is None:
            self._note(*os.waitpid(self.pid, os.WNOHANG))
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self._note(*os.waitpid(self.pid, 0))
        return self.returncode

    def _note(self, process, status):
        if process:
            self.returncode = os.waitstatus_to_exitcode(status)
