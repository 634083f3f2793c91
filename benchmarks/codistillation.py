"""What it costs that teams teach each other: a step with each exchange and without, and the bytes that are sent.

    OMP_NUM_THREADS=1 composer -n 2 benchmarks/codistillation.py [--quick] [--network cifar_resnet20 ...]

Two teams, of one process each or more, train side by side in all that is compared. Predictions are compared with a step
without exchange; weights with one that is taught by a network of the student's size which never changes, since to ask
a copy is no cost of the exchange. All take turns, an interval of the exchange each, in another order every round. What
a team waits for another's predictions is in its time; weights come in a later turn, long after they were sent. A
ratio is the median over the rounds of the ratios within a round.
"""

import argparse
import copy
import gc
import warnings
from typing import Any

import torch
from bench_parts import CLASSES, Batches, Seconds, compare_times, keep_freed_memory, medians, rotated, sgd
from composer import Trainer
from composer.core import Algorithm
from composer.loggers import InMemoryLogger
from composer.utils import dist
from row import row

from composer_kd import Codistillation, KnowledgeDistillation, NetworkTeacher, models
from composer_kd.teams import Team, split

RATIOS = {
    'predictions / alone': (['predictions'], ['alone']),
    'weights / taught': (['weights'], ['taught']),
    'taught / alone': (['taught'], ['alone']),
}


def algorithms(name: str, model: Any, interval: int) -> list[Algorithm]:
    """What one of those that are compared has."""
    if name == 'alone':
        return []
    if name == 'taught':
        teacher = NetworkTeacher(copy.deepcopy(model))
        return [KnowledgeDistillation(teacher, temperature=1.0, kd_weight=1.0, label_weight=1.0)]
    exchange = {'name': name, 'interval': f'{interval}ba'} if name == 'weights' else name
    return [Codistillation(exchange)]


def build(name: str, team: Team, arguments: argparse.Namespace) -> tuple[Trainer, InMemoryLogger]:
    """A Trainer for one of them."""
    torch.manual_seed(17 + team.index)
    model = getattr(models, arguments.network)(num_classes=CLASSES)
    on_gpu, logger = arguments.device == 'cuda', InMemoryLogger()
    trainer = Trainer(
        model=model,
        optimizers=sgd(model),
        algorithms=algorithms(name, model, arguments.interval),
        device='gpu' if on_gpu else 'cpu',
        precision='amp_bf16' if on_gpu else 'fp32',
        device_train_microbatch_size=arguments.batch_size,
        loggers=logger,
        seed=17 + team.index,
        spin_dataloaders=False,
        progress_bar=False,
    )
    return trainer, logger


def sent(logger: InMemoryLogger) -> int:
    """Bytes that a process sends at a time."""
    values = {int(value) for _, value in logger.data.get('codistillation/bytes', [])}
    assert len(values) <= 1, 'all alike'
    return values.pop() if values else 0


def main() -> None:
    arguments = options()
    team = split(2)
    together = team.channel('turns', 'cpu')
    keep_freed_memory()
    torch.manual_seed(0)
    shape = arguments.batch_size, 3, arguments.image_size, arguments.image_size
    batches = [(torch.randn(shape), torch.randint(CLASSES, shape[:1])) for _ in range(2)]
    trainers = {name: build(name, team, arguments) for name in ('alone', 'taught', 'predictions', 'weights')}
    seconds: Seconds = {name: [] for name in trainers}
    gc.disable()
    for number in range(arguments.rounds + 1):
        for name in rotated([*trainers], number):
            # The first turn warms up: until the second snapshot is in use, all that weights do is to be sent.
            clock = Batches(batches, (1 if number else 3) * arguments.interval, arguments.device == 'cuda')
            together.gather(torch.zeros(1))
            trainers[name][0].fit(train_dataloader=clock, duration='1ep')
            if number:
                seconds[name].append(clock.seconds())
        gc.collect()
    if team.index or team.rank:
        return
    size = f'{arguments.batch_size} x {arguments.image_size} x {arguments.image_size}, {CLASSES} classes'
    turns = f'{arguments.rounds} rounds of {arguments.interval} steps'
    print(f'\n{arguments.network}, {size}, {arguments.device}, 2 teams of {team.size}: medians of {turns}')
    for name, (wall, cpu) in medians(seconds).items():
        print(f'{name: <20}{wall: >10.4f} s/step{cpu: >10.4f} CPU s')
    figures = compare_times(seconds, RATIOS)
    model = trainers['alone'][0].state.model
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    formulas = {
        # Logits, bfloat16 on a GPU, and a fingerprint of each sample.
        'predictions': arguments.batch_size * ((2 if arguments.device == 'cuda' else 4) * CLASSES + 8),
        'weights': -(-weights // team.size),
    }
    found = {name: sent(trainers[name][1]) for name in formulas}
    for name, often in (('predictions', 1), ('weights', arguments.interval)):
        print(
            f'{name}: {found[name]:,} bytes at a time, {found[name] / often:,.0f} a step; by formula {formulas[name]:,}'
        )
    print(
        row(
            'codistillation',
            launcher=['composer', '-n', str(2 * team.size)],
            **figures,
            bytes_sent=found,
            bytes_by_formula=formulas,
            setting=vars(arguments) | {'teams': 2, 'processes_per_team': dist.get_world_size()},
        )
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Times the exchanges between two teams.')
    networks = [name for name in models.__all__ if 'resn' in name]
    parser.add_argument('--quick', action='store_true', help='see in seconds that it works; the figures mean nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.device_count() else 'cpu')
    parser.add_argument('--network', choices=networks, help='default: resnet50 on a GPU, cifar_resnet20 on a CPU')
    parser.add_argument('--batch-size', type=int, help='of a process; default: 128 on a GPU, 64 on a CPU')
    parser.add_argument('--image-size', type=int, help='default: 224 on a GPU, 32 on a CPU')
    parser.add_argument('--interval', type=int, help='of weights, and steps in a turn; default: 50')
    parser.add_argument('--rounds', type=int, help='default: 9')
    arguments = parser.parse_args()
    defaults = {'network': 'cifar_resnet20', 'batch_size': 64, 'image_size': 32, 'interval': 50, 'rounds': 9}
    if arguments.device == 'cuda':
        defaults |= {'network': 'resnet50', 'batch_size': 128, 'image_size': 224}
    if arguments.quick:
        defaults |= {'batch_size': 8, 'interval': 2, 'rounds': 2}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries, of which there are many
    main()
