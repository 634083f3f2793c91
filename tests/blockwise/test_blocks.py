"""Networks cut into blocks: the same network, in parts."""

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, mobilenet_v2, resnet18, vgg11_bn

from composer_kd import models
from composer_kd.blockwise.blocks import balanced_cuts, cut, cut_points


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(17)


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


CUTS = {
    resnet18: ['maxpool', 'layer1', 'layer2.0', 'layer4', 'avgpool'],
    vgg11_bn: ['features.3', 'features.15', 'avgpool', 'classifier.2'],
    mobilenet_v2: ['features.1', 'features.4', 'features.17', 'features'],
}


@pytest.mark.parametrize('builder', CUTS, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize('training', [True, False])
def test_blocks_in_a_row_are_the_network(builder, training):
    network = builder(num_classes=7).train(training)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, 3, 64, 64)
    blocks = cut(network, CUTS[builder])
    assert len(blocks) == len(CUTS[builder]) + 1
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = network(x)
    network.load_state_dict(before)
    assert torch.equal(through(blocks, x), expected)


def test_blocks_have_the_weights_of_the_network_under_their_names():
    network = resnet18(num_classes=3)
    blocks = cut(network, ['layer2'])
    parts = [block.state_dict() for block in blocks]
    assert parts[0].keys() | parts[1].keys() == network.state_dict().keys()
    assert not parts[0].keys() & parts[1].keys()
    for name, parameter in network.named_parameters():
        assert any(parameter is dict(block.named_parameters()).get(name) for block in blocks)


def test_where_a_network_can_be_cut():
    network = resnet18()
    assert cut_points(network)[:4] == ['conv1', 'bn1', 'relu', 'maxpool']
    points = cut_points(network, all_names=True)
    assert {'layer1', 'layer1.0', 'layer1.1'} <= {*points}
    assert not {'layer1.0.conv1', 'layer1.0.bn2', 'layer2.0.downsample', 'fc'} & {*points}
    for name in cut_points(network):
        assert len(cut(network, [name])) == 2


@pytest.mark.parametrize('at', [['layer1.0.conv1'], ['layer2.0.downsample'], ['fc']])
def test_not_where_something_else_is_on_its_way(at):
    with pytest.raises(ValueError, match=rf"after '{at[0]}' there are other values .* can be cut after conv1, bn1, "):
        cut(resnet18(), at)


def test_a_name_that_is_none():
    with pytest.raises(
        ValueError, match=r"there is no module 'layer9', after which to cut; it can be done after conv1"
    ):
        cut(resnet18(), ['layer9'])


@pytest.mark.parametrize('at', [['layer2', 'layer1'], ['layer1', 'layer1'], ['layer1.1', 'layer1']])
def test_cuts_that_are_not_in_order(at):
    with pytest.raises(ValueError, match=rf'{at[1]} does not run after {at[0]}: give cuts in the order'):
        cut(resnet18(), at)


def test_a_dense_network_is_cut_between_its_blocks():
    points = cut_points(densenet121())
    assert 'features.transition1' in points and not any(name.startswith('features.denseblock1.') for name in points)


class Branching(nn.Module):
    """What torch.fx cannot follow."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_followed():
    with pytest.raises(
        ValueError, match=r'Branching cannot be followed by torch\.fx \(symbolically traced .* of your own'
    ):
        cut(Branching(), [])


class Two(nn.Module):
    """What takes two tensors."""

    def forward(self, x, y):
        return x + y


def test_a_network_of_two_inputs():
    with pytest.raises(ValueError, match='Two takes 2 inputs: blocks take one tensor'):
        cut(Two(), [])


class Tied(nn.Module):
    """Whose first layer is its last one, too."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(3, 3), nn.ReLU()
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def test_a_weight_in_two_blocks():
    with pytest.raises(
        ValueError, match=r'last\.weight is in block 0 and in block 1: a weight can be in one block alone'
    ):
        cut(Tied(), ['middle'])


class Direct(nn.Module):
    """Which uses a weight of its own, not a module's, on both sides of a cut."""

    def __init__(self):
        super().__init__()
        self.register_buffer('scale', torch.tensor(3.0))
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x * self.scale)) * self.scale


def test_a_buffer_that_several_blocks_use():
    network, x = Direct(), torch.randn(2, 3)
    assert torch.equal(through(cut(network, ['first']), x), network(x))


def test_cut_by_cost_the_costliest_block_costs_least():
    network = nn.Sequential(*(nn.Linear(10, 10) for _ in range(7)), nn.Linear(10, 40))
    at = balanced_cuts(network, 3, torch.randn(2, 10))
    assert at == ['2', '6']
    blocks = cut(network, at)
    assert [len([*block.parameters()]) // 2 for block in blocks] == [3, 4, 1]  # the last one costs as much as four


def test_by_cost_a_network_stays_as_it_is():
    network = resnet18(num_classes=3).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    at = balanced_cuts(network, 4, torch.randn(2, 3, 32, 32))
    assert len(at) == 3 and network.training
    at = balanced_cuts(network, 3, torch.randn(2, 3, 32, 32), among=['layer2', 'layer1', 'layer3.0', 'maxpool', 'fc'])
    assert at == ['layer1', 'layer3.0']
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize('number', [0, 9])
def test_more_blocks_than_there_can_be(number):
    with pytest.raises(ValueError, match=f'the network can be cut into 1 to 3 blocks, not {number}'):
        balanced_cuts(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), number, torch.randn(1, 2))


def test_networks_of_our_own():
    network = models.small_convnet(width=4, depth=2).module
    x = torch.randn(2, 1, 28, 28)
    network.eval()
    assert torch.equal(through(cut(network, cut_points(network)[1:4]), x), network(x))
