"""Slurm's commands, as far as submitit uses them: arrays of jobs that really run, as processes of this machine.

Installed under their own names in a folder on PATH. What they know lies in the folder $SLURM_STAND_IN: for each job a
file of JSON, and in `calls.txt` all that was asked. Where $SLURM_STAND_IN_TASK is set, a job does that in place of its
own work.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

COMMANDS = ('sbatch', 'srun', 'sacct', 'squeue', 'scancel', 'scontrol')
WAITING = ('PENDING', 'RUNNING')


def install(folder):
    """Make the commands; a folder for PATH."""
    for name in COMMANDS:
        command = Path(folder, name)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        command.chmod(0o755)
    Path(folder, 'state').mkdir()
    return folder


def state():
    return Path(os.environ['SLURM_STAND_IN'])


def jobs():
    return {path.stem: json.loads(path.read_text()) for path in sorted(state().glob('*.json'))}


@contextlib.contextmanager
def changing(job):
    """The facts of a job, to be changed by one process at a time."""
    with Path(state(), 'lock').open('a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = state() / f'{job}.json'
        facts = json.loads(path.read_text()) if path.exists() else {}
        yield facts
        beside = path.with_suffix('.new')
        beside.write_text(json.dumps(facts))
        beside.replace(path)


def sbatch(file):
    text = Path(file).read_text()
    options = dict(re.findall(r'^#SBATCH --([\w-]+)=(.*)$', text, re.M))
    number = 1000 + 100 * len(list(state().glob('array-*')))
    Path(state(), f'array-{number}').touch()
    first, last, at_once = re.fullmatch(r'(\d+)-(\d+)%(\d+)', options.get('array', '0-0%1')).groups()
    own = [f'{number}_{index}' if 'array' in options else f'{number}' for index in range(int(first), int(last) + 1)]
    for index, job in enumerate(own):
        with changing(job) as facts:
            facts |= {
                'state': 'PENDING',
                'id': number + 1 + index if 'array' in options else number,
                'nodes': int(options.get('nodes', 1)),
                'name': options['job-name'],
            }
    # What sbatch leaves behind is no child of who asked, and does not hold its output.
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        work(text, own, int(at_once))
        os._exit(0)
    print(f'Submitted batch job {number}')


def work(text, own, at_once):
    running = {}
    script = Path(state(), f'{own[0]}.sh')
    script.write_text(text)
    while own or running:
        for job, process in [*running.items()]:
            if process.poll() is not None:
                del running[job]
                with changing(job) as facts:
                    if facts.pop('is_requeued', False):
                        facts['state'] = 'PENDING'
                        own.append(job)
                    elif facts['state'] == 'RUNNING':
                        facts['state'] = 'FAILED' if process.returncode else 'COMPLETED'
        while own and len(running) < at_once:
            job = own.pop(0)
            with changing(job) as facts:
                if facts['state'] == 'PENDING':
                    running[job] = subprocess.Popen(
                        ['bash', script], env=os.environ | environment(job, facts), start_new_session=True
                    )
                    facts |= {'state': 'RUNNING', 'process': running[job].pid}
        time.sleep(0.05)


def environment(job, facts):
    array, _, index = job.partition('_')
    of_array = {'SLURM_ARRAY_JOB_ID': array, 'SLURM_ARRAY_TASK_ID': index} if index else {}
    nodes = facts['nodes']
    hosts = ','.join(['localhost'] * nodes)
    numbers = {'SLURM_JOB_ID': facts['id'], 'SLURM_JOB_NUM_NODES': nodes, 'SLURM_NTASKS': nodes}
    return {
        **of_array,
        **{name: str(value) for name, value in numbers.items()},
        'SLURM_JOB_NODELIST': hosts,
        'SLURM_STAND_IN_JOB': job,
    }


def srun(*arguments):
    """One task on each node, which is this machine."""
    options, command, rest = {}, [], list(arguments)
    while rest and not command:
        option = rest.pop(0)
        if option in ('--output', '--error'):
            options[option] = rest.pop(0)
        elif not option.startswith('--'):
            command = [option, *rest]
    if task := os.environ.get('SLURM_STAND_IN_TASK'):
        command = ['sh', '-c', task]
    array, index = os.environ.get('SLURM_ARRAY_JOB_ID'), os.environ.get('SLURM_ARRAY_TASK_ID')
    job = os.environ['SLURM_STAND_IN_JOB']
    tasks = []
    for node in range(int(os.environ['SLURM_JOB_NUM_NODES'])):
        names = {'%A': array or '', '%a': index or '', '%j': job, '%t': str(node)}
        files = [Path(re.sub('%[Aajt]', lambda m: names[m[0]], options[key])) for key in ('--output', '--error')]
        with files[0].open('a') as out, files[1].open('a') as err:
            place = {'SLURM_NODEID': str(node), 'SLURM_PROCID': str(node), 'SLURM_LOCALID': '0'}
            tasks.append(subprocess.Popen(command, env=os.environ | place, stdout=out, stderr=err))
    with changing(job) as facts:
        facts['tasks'] = [task.pid for task in tasks]
    return max(abs(task.wait()) for task in tasks)


def sacct(*arguments):
    print('JobID|State|NodeList')
    for job, facts in jobs().items():
        if job.split('_')[0] in arguments:
            print(f'{job}|{facts["state"]}|localhost')


def squeue(*options):
    names = [option.removeprefix('--name=') for option in options if option.startswith('--name=')]
    found = {job: facts for job, facts in jobs().items() if facts['state'] in WAITING}
    print(''.join(f'{job}\n' for job, facts in found.items() if not names or facts['name'] in names), end='')


def scontrol(what, job):
    assert what == 'requeue'
    with changing(job) as facts:
        facts['is_requeued'] = True
        process = facts['process']
    end(process)


def scancel(*arguments):
    if '--signal' in arguments:
        job, _, name = arguments
        for task in jobs()[job]['tasks']:
            os.kill(task, getattr(signal, f'SIG{name}'))
        return
    for job in arguments:
        with changing(job) as facts:
            was, facts['state'] = facts['state'], 'CANCELLED by 0' if facts['state'] in WAITING else facts['state']
        if was == 'RUNNING':
            end(facts['process'])


def end(process):
    """As Slurm does: all that belongs to the job, in whatever session; not who asks for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for each in [*parent.children(recursive=True), parent]:
            if each.pid not in (os.getpid(), os.getppid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


if __name__ == '__main__':
    with Path(state(), 'calls.txt').open('a') as calls:
        calls.write(' '.join(sys.argv[1:]) + '\n')
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
