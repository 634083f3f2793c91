"""Networks cut into blocks that follow one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer
from torch.utils.flop_counter import FlopCounterMode


def cut(network: nn.Module, at: Sequence[str]) -> list[GraphModule]:
    """Cut a network into blocks, so that each takes what the one before gives.

    The blocks have the very modules of the network, under their names there: to train them is to train it. The network
    is followed by :mod:`torch.fx`, in the mode, of training or evaluation, that it is in.

    Args:
        network: Takes one tensor, and gives one.
        at: Names of modules after which to cut, in the order in which they run; see :func:`cut_points`.

    Raises:
        ValueError: The network cannot be followed, or cannot be cut there.
    """
    graph = _followed(network)
    points = _points(graph)
    ends = [_point(points, graph, name) for name in at]
    for (name, end), (following, later) in itertools.pairwise(zip(at, ends, strict=True)):
        if later <= end:
            raise ValueError(f'{following} does not run after {name}: give cuts in the order in which they run')
    nodes = [*graph.nodes]
    bounds = [None, *(nodes[end] for end in ends), None]
    blocks = [_block(network, graph, begin, end) for begin, end in itertools.pairwise(bounds)]
    _refuse_shared(blocks)
    return blocks


def balanced_cuts(network: nn.Module, blocks: int, example: Tensor, among: Collection[str] | None = None) -> list[str]:
    """Names of the modules after which to cut, so that the costliest of so many blocks costs as little as can be.

    Args:
        network: Takes one tensor, and gives one.
        blocks: How many.
        example: An input, to count the floating point operations of each part.
        among: Names to choose from. Default: None, all after which the network can be cut.

    Raises:
        ValueError: The network cannot be followed, or not be cut into so many.
    """
    graph = _followed(network)
    points = {name: place for name, place in _points(graph).items() if among is None or name in among}
    costs = _costs(network, graph, example)
    ends = [*sorted({*points.values()}), len(costs) - 1]
    # Where nothing costs anything between two places, such as a normalization, it is done before the cut.
    worth = [place for place, after in itertools.pairwise(ends) if sum(costs[place + 1 : after + 1])]
    places = _balanced(costs, worth, blocks)
    return [min((name for name in points if points[name] == place), key=len) for place in places]


def cut_points(network: nn.Module, *, all_names: bool = False) -> list[str]:
    """Names of the modules after which a network can be cut, in the order in which they run.

    These are where all that comes after depends on what came before by one tensor alone: not inside of what a shortcut
    goes around.

    Args:
        network: Takes one tensor, and gives one.
        all_names: Whether each place has all of its names; a stage that ends with a layer ends where that does.
            Default: False, the shortest one.

    Raises:
        ValueError: The network cannot be followed.
    """
    names: dict[int, list[str]] = {}
    for name, place in _points(_followed(network)).items():
        names.setdefault(place, []).append(name)
    return [name for place in sorted(names) for name in sorted(names[place], key=len)[: None if all_names else 1]]


def _followed(network: nn.Module) -> Graph:
    try:
        graph = Tracer().trace(network)
    except Exception as error:  # of many types, from wherever a network does what cannot be followed
        why = str(error).partition('\n')[0]
        todo = 'give its blocks as modules of your own'
        raise ValueError(f'{type(network).__name__} cannot be followed by torch.fx ({why}): {todo}') from error
    inputs = [node for node in graph.nodes if node.op == 'placeholder' and node.users]
    if len(inputs) != 1:
        raise ValueError(f'{type(network).__name__} takes {len(inputs)} inputs: blocks take one tensor')
    return graph


def _points(graph: Graph) -> dict[str, int]:
    """Where a graph can be cut: each name of a place, and the number of the node that is the last before the cut."""
    nodes = [*graph.nodes]
    place = {node: index for index, node in enumerate(nodes)}
    until = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    last_of = {name: index for index, node in enumerate(nodes) for name in _names(node)}
    points: dict[str, int] = {}
    alive: set[Node] = set()
    for index, node in enumerate(nodes):
        if node.op != 'get_attr':  # which any block can have
            alive.add(node)
        alive = {each for each in alive if until[each] > index}
        is_last = any(user.op == 'output' for user in node.users)
        if node.op in ('call_module', 'call_function', 'call_method') and alive == {node} and not is_last:
            names = [name for name in _names(node) if last_of[name] == index] or [node.name]
            points |= dict.fromkeys(names, index)
    return points


def _names(node: Node) -> list[str]:
    """Of the modules in which a node is."""
    names = [name for name, _ in node.meta.get('nn_module_stack', {}).values() if name]
    return names if node.op != 'call_module' or node.target in names else [*names, str(node.target)]


def _point(points: dict[str, int], graph: Graph, name: str) -> int:
    if name in points:
        return points[name]
    known = {each for node in graph.nodes for each in _names(node)}
    if name not in known:
        raise ValueError(f'there is no module {name!r}, after which to cut; it can be done after {", ".join(points)}')
    raise ValueError(
        f'after {name!r} there are other values on their way than its output, as beside a shortcut, or the network '
        f'ends; it can be cut after {", ".join(points)}'
    )


def _block(network: nn.Module, graph: Graph, begin: Node | None, end: Node | None) -> GraphModule:
    """What runs after one node up to another one."""
    block, copies = Graph(), {}

    def copied(node: Node) -> Node:
        if node not in copies:  # a weight that the network has itself
            assert node.op == 'get_attr', node
            copies[node] = block.node_copy(node)
        return copies[node]

    if begin is not None:
        copies[begin] = block.placeholder('x')
    is_inside = begin is None
    for node in graph.nodes:
        if is_inside and (node.op not in ('get_attr', 'placeholder') or (node.op == 'placeholder' and node.users)):
            copies[node] = block.node_copy(node, copied)
        if node is end:
            block.output(copies[node])
            break
        is_inside = is_inside or node is begin
    return GraphModule(network, block)


def _refuse_shared(blocks: Sequence[nn.Module]) -> None:
    owner: dict[Tensor, int] = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(parameter, number) != number:
                raise ValueError(
                    f'{name} is in block {owner[parameter]} and in block {number}: a weight can be in one block alone'
                )


class _Counting(Interpreter):
    """Counts the floating point operations of each node."""

    def __init__(self, network: nn.Module, graph: Graph):
        super().__init__(GraphModule(network, graph))
        self.costs: list[int] = []

    def run_node(self, n: Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.costs.append(counter.get_total_flops())
        return result


@torch.no_grad()
def _costs(network: nn.Module, graph: Graph, example: Tensor) -> list[int]:
    """Floating point operations of each node. Statistics of BatchNorm stay as they are."""
    counting = _Counting(network, graph)
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        counting.run(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counting.costs


def _balanced(costs: Sequence[int], places: Sequence[int], blocks: int) -> list[int]:
    """Of the places at which to cut, those by which the costliest block costs least."""
    if not 1 <= blocks <= len(places) + 1:
        raise ValueError(f'the network can be cut into 1 to {len(places) + 1} blocks, not {blocks}')
    ends = [-1, *places, len(costs) - 1]

    def cost(first: int, last: int) -> int:
        return sum(costs[ends[first] + 1 : ends[last] + 1])

    @cache
    def best(last: int, number: int) -> tuple[float, tuple[int, ...]]:
        """The least cost of the costliest of so many blocks up to an end, and where these end."""
        if number == 1:
            return cost(0, last), (last,)
        options = ((best(before, number - 1), cost(before, last)) for before in range(number - 1, last))
        found = ((max(so_far, own), (*cuts, last)) for (so_far, cuts), own in options)
        return min(found, default=(math.inf, ()))

    return [ends[number] for number in best(len(ends) - 1, blocks)[1][:-1]]
