"""Weights that wait on the host: what is on the device when, and that nothing else tells."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from composer import Callback
from test_network import BATCH, IMAGES, STATE
from torch import nn

from composer_kd import (
    EarlyStopDistillation,
    KnowledgeDistillation,
    NetworkTeacher,
    TeacherError,
    TeacherPool,
    TeacherSampling,
)
from composer_kd.algorithms.knowledge_distillation import distills
from composer_kd.algorithms.teacher_sampling import draw_teachers
from composer_kd.teachers.residency import Residency, can_wait, shares_tensors, weight_bytes
from settings import CLASSES, network, teachers, train, trainer, weights

CPU = torch.device('cpu')


class Various(nn.Module):
    """Parameters and buffers of several dtypes and memory formats, tied and without an element."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 36, CLASSES).bfloat16()
        self.same_head = self.head
        self.register_buffer('of_size_0', torch.empty(0, 4))
        self.register_buffer('expanded', torch.arange(4).expand(3, 4))

    def forward(self, images):
        return self.same_head(self.norm(self.conv(images)).flatten(1).bfloat16())


def various(seed=0):
    torch.manual_seed(seed)
    return Various().eval().requires_grad_(False)


def test_a_network_is_the_same_on_host_and_device():
    model = various()
    before, expected = copy.deepcopy(model), model(IMAGES)
    residency = Residency(CPU)
    residency.take(7, model)
    assert residency.on_device == [] and residency.bytes == 0
    for on_device in ([7], [], [7]):
        residency.settle(on_device, ())
        if on_device:
            residency.arrive(7)
        assert residency.on_device == on_device
        assert bool(residency.bytes) == bool(on_device)
        for (name, was), now in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(now, was) and now.dtype == was.dtype, name
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(model(IMAGES), expected)
    assert residency.bytes >= weight_bytes(model) - model.expanded.nbytes
    residency.end()
    assert torch.equal(model(IMAGES), expected) and residency.bytes == 0


def test_it_is_the_copy_that_is_used():
    model = various()
    residency = Residency(CPU)
    residency.take(0, model)
    on_host = model.conv.weight.data_ptr()
    residency.settle([0], ())
    assert model.conv.weight.data_ptr() == on_host  # until it has arrived
    residency.arrive(0)
    assert model.conv.weight.data_ptr() != on_host
    residency.settle((), ())
    assert model.conv.weight.data_ptr() == on_host


def test_what_arrives_was_fetched_before_or_is_now():
    residency = Residency(CPU)
    for index in range(3):
        residency.take(index, various(index))
    residency.settle([2], [0])
    assert residency.on_device == [0, 2]
    residency.arrive(1)
    residency.arrive(5)  # one that never was on the host
    assert residency.on_device == [0, 1, 2]
    residency.settle([0], [0])
    assert residency.on_device == [0]


def test_no_copy_outlives_its_time():
    model = various()
    residency = Residency(CPU)
    residency.take(0, model)
    residency.arrive(0)
    gone = weakref.ref(residency._weights[0].copies[0])
    residency.settle((), ())
    gc.collect()
    assert gone() is None


def test_who_cannot_wait():
    class Packed(nn.Parameter):
        pass

    model, shared = various(), various()
    assert can_wait(model) and not shares_tensors(model, [shared])
    shared.head = model.head
    assert shares_tensors(model, [shared]) and shares_tensors(shared, [model])
    model.conv.weight = Packed(model.conv.weight, requires_grad=False)
    assert not can_wait(model)
    for pool in ([NetworkTeacher(model)], [NetworkTeacher(network(1))] * 2):
        with pytest.raises(TeacherError, match=r"residency='host' is not for teacher \w+ \(number \d\)"):
            TeacherPool(pool, residency='host').prepare(STATE)
        TeacherPool(pool).prepare(STATE)


def test_neither_of_two_that_share_waits(monkeypatch):
    models = [various() for _ in range(3)]
    models[1].head = models[0].head
    pool = TeacherPool([NetworkTeacher(model) for model in models])
    monkeypatch.setattr(pool, '_room', lambda device: 1.0)
    pool.prepare(STATE)
    assert pool._residency is not None and list(pool._residency._weights) == [2]


@pytest.mark.parametrize('residency', ['auto', 'device'])
def test_on_a_cpu_weights_stay_where_they_are(residency):
    pool = TeacherPool(teachers(3), residency=residency)
    places = [teacher.network.module[0].weight.data_ptr() for teacher in pool.teachers]
    pool.prepare(STATE)
    assert [teacher.network.module[0].weight.data_ptr() for teacher in pool.teachers] == places
    assert not pool.waits_on_host
    assert pool.bytes_on_device == sum(weight_bytes(teacher.network) for teacher in pool.teachers)
    pool.release()
    assert pool.bytes_on_device == 0


class Watch(Callback):
    """Who has weights on the device, in each batch, while teachers are asked."""

    def __init__(self, pool):
        self.pool = pool
        self.seen = []
        self.bytes = []

    def after_forward(self, state, logger):
        self.seen.append(set(self.pool._residency.on_device))
        self.bytes.append(self.pool.bytes_on_device)


def heard(batch):
    return draw_teachers(3, batch, pool_size=5)[0]


def test_on_the_device_are_the_present_one_and_the_next():
    distillation = KnowledgeDistillation(teachers(5), residency='host')
    watch = Watch(distillation.pool)
    train([TeacherSampling(), distillation], callbacks=watch)
    assert watch.seen == [{heard(batch), heard(batch + 1)} for batch in range(8)]
    assert len({heard(batch) for batch in range(8)}) > 2
    of_one = max(watch.bytes) / 2
    assert 0 < of_one <= 2 * weight_bytes(distillation.pool.teachers[0].network)  # room between tensors counts too


def test_batches_that_do_not_distill_are_looked_over():
    distillation = KnowledgeDistillation(teachers(5), residency='host', interval=2, probability=0.6)
    watch = Watch(distillation.pool)
    train([TeacherSampling(), distillation], callbacks=watch, max_duration='4ep')
    that_distill = [batch for batch in range(60) if distills(3, batch, interval=2, probability=0.6)]
    assert 2 < len([batch for batch in that_distill if batch < 16]) < 8
    for batch, seen in enumerate(watch.seen):
        coming = heard(next(b for b in that_distill if b > batch))
        assert seen == ({heard(batch), coming} if batch in that_distill else {coming})


def test_several_are_kept_as_long_as_they_speak():
    distillation = KnowledgeDistillation(teachers(3), residency='host')
    watch = Watch(distillation.pool)
    train([distillation], callbacks=watch)
    assert watch.seen == [{0, 1, 2}] * 8


@pytest.mark.parametrize('options', [{}, {'device_train_microbatch_size': 8}])
def test_host_and_device_train_the_same_bits(options):
    def trained(residency):
        return weights(train([TeacherSampling(2), KnowledgeDistillation(teachers(4), residency=residency)], **options))

    on_device = trained('device')
    assert all(torch.equal(value, on_device[name]) for name, value in trained('host').items())


def test_a_compiled_network_is_compiled_once(monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    model = network(1)
    expected = copy.deepcopy(model).eval()(IMAGES)
    pool = TeacherPool([NetworkTeacher(model, compile=True)], residency='host')
    pool.prepare(STATE)
    torch._dynamo.utils.counters.clear()
    for present in ([0], [], [0]):
        pool.place(present, [])
        if present:
            torch.testing.assert_close(pool.signal(BATCH, present, torch.zeros(4, CLASSES)), expected)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_manifests_and_those_who_hold_the_network_know_nothing_of_it():
    mine = [network(i) for i in range(3)]
    before = copy.deepcopy([model.state_dict() for model in mine])
    pool = [NetworkTeacher(model) for model in mine]
    manifests = [teacher.manifest() for teacher in pool]
    distillation = KnowledgeDistillation(pool, residency='host')
    run = train([distillation, TeacherSampling(), EarlyStopDistillation('4ba')])
    assert distillation.pool.released and not distillation.pool.waits_on_host
    assert run.state.algorithms[-1].state_dict()['teachers'] == manifests
    for model, was in zip(mine, before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


def test_the_run_may_grow_longer():
    def algorithms(residency):
        return [KnowledgeDistillation(teachers(3), residency=residency), TeacherSampling()]

    ends = []
    for residency in ('device', 'host'):
        run = trainer(algorithms(residency), max_duration='1ep')
        run.fit()
        run.fit(duration='1ep')
        run.close()
        ends.append(weights(run))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def large(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1 << 16), nn.ReLU(), nn.Linear(1 << 16, CLASSES))


@pytest.mark.gpu
@gpu
def test_memory_of_a_device_is_flat_in_the_number_of_teachers():
    def peak(number):
        pool = [NetworkTeacher(large(seed)) for seed in range(number)]
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(
            [KnowledgeDistillation(pool, residency='host'), TeacherSampling()],
            device='gpu', precision='fp32', max_duration='8ep',
        )  # fmt: skip
        return torch.cuda.max_memory_allocated() - before

    assert peak(8) <= peak(3) + (1 << 20)


@pytest.mark.gpu
@gpu
def test_copies_beside_the_work_train_the_same_bits_on_a_device():
    def trained(residency):
        pool = [NetworkTeacher(large(seed)) for seed in range(5)]
        algorithms = [TeacherSampling(), KnowledgeDistillation(pool, residency=residency)]
        run = train(algorithms, device='gpu', precision='fp32', max_duration='8ep', deterministic_mode=True)
        return weights(run), run

    (on_device, _), (on_host, run) = trained('device'), trained('host')
    assert all(torch.equal(value, on_device[name]) for name, value in on_host.items())
    networks = [teacher.network for teacher in run.state.algorithms[-1].pool.teachers]
    assert sum(parameter.is_pinned() for model in networks for parameter in model.parameters()) >= 12
