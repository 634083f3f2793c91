"""How long one step of distillation takes for BERT: ours, and plain loops', measured as in step_time.py.

    python benchmarks/step_time_bert.py [--quick] [--student 4x256 --teacher 8x512 ...]

The plain loops score labelled positions alone, as ours does, but all at once; `dense_loop` is the loop of most people,
which scores all positions and picks out those that have a label.
"""

import argparse
import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from bench_parts import SPREAD, Batches, Build, Setting, Train, keep_freed_memory, loss_by_hand, sgd
from step_time import composer_kd, composer_student, measure
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from composer_kd.models.masked_lm import MaskedLM

Batch = dict[str, Tensor]


def bert(size: str, arguments: argparse.Namespace) -> MaskedLM:
    """A network of so many layers x hidden size, without dropout: all must do the same."""
    layers, hidden = (int(number) for number in size.split('x'))
    config = BertConfig(
        vocab_size=arguments.words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, arguments.length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return MaskedLM(BertForMaskedLM(config)).to(arguments.device)


def random_batch(arguments: argparse.Namespace) -> Batch:
    """Words, and labels of some of them."""
    shape = arguments.batch_size, arguments.length
    words = torch.randint(arguments.words, shape, device=arguments.device)
    masked = torch.rand(shape, device=arguments.device) < arguments.masked
    labels = words.masked_fill(~masked, -100)
    return {'input_ids': words.masked_fill(masked, 0), 'attention_mask': torch.ones_like(words), 'labels': labels}


def spread(teacher: MaskedLM, batch: Batch) -> None:
    """Let an untrained network teach as a trained one does: with logits far apart."""
    network: Any = teacher.model
    with torch.no_grad():
        network.cls.predictions.transform.LayerNorm.weight *= SPREAD / scores_of(network, batch)[0].std()


def scores_of(network: Any, batch: Batch, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and labels of the labelled positions."""
    inputs = {name: value for name, value in batch.items() if name != 'labels'}
    labels = batch['labels'].flatten()
    positions = (labels != -100).nonzero().squeeze(1)
    if everywhere:
        return network(**inputs).logits.flatten(0, 1)[positions], labels[positions]
    hidden = network.bert(**inputs).last_hidden_state.flatten(0, 1)
    return network.cls(hidden[positions]), labels[positions]


def networks(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Student and teacher as bare networks."""
    student, teacher = copy.deepcopy(setting.student.model), copy.deepcopy(setting.teacher.model)
    return student.train(), teacher.eval().requires_grad_(False)


def student_step(setting: Setting) -> tuple[nn.Module, Train]:
    """A part of the work: a step without a teacher."""
    student, _ = networks(setting)
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        for batch in batches:
            with setting.autocast():
                loss = F.cross_entropy(*scores_of(student, batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return student, train


def teacher_forward(setting: Setting) -> tuple[nn.Module, Train]:
    """The other part of the work: the teacher's forward pass."""
    student, teacher = networks(setting)

    def train(batches: Batches) -> None:
        for batch in batches:
            with torch.no_grad(), setting.autocast():
                scores_of(teacher, batch)

    return student, train


def plain_loop(setting: Setting, everywhere: bool = False) -> tuple[nn.Module, Train]:
    """Distillation by hand, at labelled positions alone."""
    student, teacher = networks(setting)
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        for batch in batches:
            with setting.autocast():
                with torch.no_grad():
                    teacher_logits, _ = scores_of(teacher, batch, everywhere)
                logits, labels = scores_of(student, batch, everywhere)
                loss = loss_by_hand(logits, teacher_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return student, train


def dense_loop(setting: Setting) -> tuple[nn.Module, Train]:
    """Distillation as one writes it by hand."""
    return plain_loop(setting, everywhere=True)


BUILDS: list[Build] = [student_step, teacher_forward, plain_loop, dense_loop, composer_student, composer_kd]


def main() -> None:
    arguments = options()
    keep_freed_memory()
    torch.manual_seed(17)
    student, teacher = (bert(size, arguments) for size in (arguments.student, arguments.teacher))
    batches = [random_batch(arguments) for _ in range(2)]
    spread(teacher, batches[0])
    setting = Setting(student, teacher, arguments.batch_size, torch.device(arguments.device))
    title = (
        f'BERT {arguments.student} from {arguments.teacher}, {arguments.batch_size} x {arguments.length} words of '
        f'{arguments.words}, {arguments.masked:.0%} with a label'
    )
    measure('step_time_bert', title, BUILDS, setting, batches, arguments)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Times one step of distillation of BERT, ours and by hand.')
    parser.add_argument('--quick', action='store_true', help='see in seconds that it works; the figures mean nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--student', help='layers x hidden size; default: 12x768 (base) on a GPU, 4x256 on a CPU')
    parser.add_argument('--teacher', help='the same; default: 24x1024 (large) on a GPU, 8x512 on a CPU')
    parser.add_argument('--batch-size', type=int, help='default: 256 on a GPU, 16 on a CPU')
    parser.add_argument('--length', type=int, default=128, help='of a text, in words; default: 128')
    parser.add_argument('--words', type=int, help='of the vocabulary; default: 30522')
    parser.add_argument('--masked', type=float, default=0.15, help='share that has a label; default: 0.15')
    parser.add_argument('--rounds', type=int, help='default: 20')
    parser.add_argument('--steps', type=int, help='steps in a round; default: 20 on a GPU, 1 on a CPU')
    arguments = parser.parse_args()
    defaults = {'student': '4x256', 'teacher': '8x512', 'batch_size': 16, 'words': 30522, 'rounds': 20, 'steps': 1}
    if arguments.device == 'cuda':
        defaults |= {'student': '12x768', 'teacher': '24x1024', 'batch_size': 256, 'steps': 20}
    if arguments.quick:
        defaults |= {'student': '1x32', 'teacher': '2x64', 'batch_size': 4, 'words': 1000, 'rounds': 2, 'steps': 1}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.rounds < 2 or arguments.steps < 1:
        parser.error('it takes at least 2 rounds of 1 step')
    return arguments


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries
    main()
