"""What a plan promises, beside the baselines: as a table and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_kd.blockwise.plan import Costs, Device, Plan, data_parallel, layer_split
from composer_kd.blockwise.simulate import Timing, Work, idle, simulate, step_seconds
from composer_kd.files import write

_BATCHES = 40  # that are simulated
_SHOWN = 8  # batches in the picture


@dataclass(frozen=True)
class Forecast:
    """How long a step takes, as a plan is run and as the baselines are.

    Args:
        plan: The plan.
        steps: Seconds of a step: `relay`, the plan's pipeline, simulated; `relay with a barrier`, if all stages waited
            for each other after each batch; `data parallel`, one block after another on all devices; `layer split`,
            blocks that are dealt out, each with the teacher's blocks before it.
        stages: What each stage does with a batch.
        waits: For each stage, the share of the time in which it waits.
        work: What the simulated pipeline did.
    """

    plan: Plan
    steps: dict[str, float]
    stages: list[Timing]
    waits: tuple[float, ...]
    work: list[Work]


def forecast(costs: Costs, devices: Sequence[Device], plan: Plan, *, depth: int = 2) -> Forecast:
    """Simulate a plan, and compute what the baselines take.

    Args:
        costs: Of the blocks.
        devices: In order.
        plan: Of these.
        depth: Buffers between two stages. Default: 2.
    """
    stages = timings(costs, devices, plan)
    work = simulate(stages, _BATCHES, depth=depth)
    steps = {
        'relay': step_seconds(work),
        'relay with a barrier': step_seconds(simulate(stages, _BATCHES, depth=depth, barrier=True)),
        'data parallel': data_parallel(costs, devices),
        'layer split': layer_split(costs, devices)[0],
    }
    return Forecast(plan, steps, stages, tuple(idle(work, number) for number in range(len(stages))), work)


def timings(costs: Costs, devices: Sequence[Device], plan: Plan) -> list[Timing]:
    """What each stage of a plan does with a batch."""
    found = []
    for stage in plan.stages:
        column, speed = len(stage.devices) - 1, min(devices[number].speed for number in stage.devices)
        relay, train, average = (
            sum(table[block][column] for block in stage.blocks)
            for table in (costs.teacher, costs.student, costs.average)
        )
        found.append(Timing(costs.receive[stage.blocks[0]][column], relay / speed, train / speed + average))
    return found


def table(found: Forecast) -> str:
    """For people."""
    lines = [f'{"stage": <7}{"blocks": <9}{"devices": <9}{"ms to receive": >14}{"ms of work": >12}{"waits": >8}']
    for number, (stage, timing, waits) in enumerate(zip(found.plan.stages, found.stages, found.waits, strict=True)):
        own = f'{number: <7}{_range(stage.blocks): <9}{_range(stage.devices): <9}'
        work = timing.relay + timing.train
        lines.append(f'{own}{1000 * timing.receive: >14.2f}{1000 * work: >12.2f}{waits: >8.0%}')
    lines.append(f'{"a step": <25}{"": >14}{"ms": >12}{"ratio": >8}')
    for name, seconds in found.steps.items():
        lines.append(f'{name: <39}{1000 * seconds: >12.2f}{seconds / found.steps["relay"]: >8.2f}')
    return '\n'.join(lines)


def draw(found: Forecast, path: Path, title: str) -> None:
    """Draw what the first batches of the simulated pipeline do, a row for each stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.5 * len(found.plan.stages)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for each in found.work:
        if each.batch < _SHOWN:
            colour = f'C{each.batch % 10}'
            style = {'color': colour, 'alpha': 0.45 if each.kind == 'relay' else 1.0}
            axes.barh(each.stage, 1000 * (each.end - each.begin), left=1000 * each.begin, height=0.7, **style)
    names = [f'{_range(stage.devices)}: blocks {_range(stage.blocks)}' for stage in found.plan.stages]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel='milliseconds; light: the teacher, full: the student; a colour for each batch', title=title)
    axes.spines[['top', 'right']].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix('.'), dpi=120)
    write(path, picture.getvalue())


def _range(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f'{numbers[0]}-{numbers[-1]}'
