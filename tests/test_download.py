import hashlib

import pytest
import torch
import torchvision

from helpers import on_two_ranks

CODE = """
import time, timm, torch
from composer_kd import models
from composer_kd.models.torchvision_models import _published

def noted(function):
    def call(*args, **kwargs):
        begin = time.monotonic()
        time.sleep(1 - dist.get_local_rank())
        result = function(*args, **kwargs)
        print('CALL', begin, time.monotonic())
        return result
    return call

_published('resnet18')['IMAGENET1K_V1'].value.__dict__['url'] = {url!r}
timm.create_model = noted(timm.create_model)
models.timm('local-dir:.', num_classes=5, pretrained=True)
models.timm('resnet10t', num_classes=5)
torch.hub.download_url_to_file = noted(torch.hub.download_url_to_file)
print('BIAS', models.resnet18(weights='IMAGENET1K_V1').module.fc.bias.sum().item())
"""


def test_weights_are_downloaded_by_the_first_rank_of_a_machine(tmp_path, monkeypatch):
    library = pytest.importorskip('timm', reason='the optional extra `timm` is not installed')
    library.models._hub.save_for_hf(
        library.create_model('resnet10t', num_classes=5), tmp_path, safe_serialization=False
    )
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    digest = hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest()[:8]
    file = (tmp_path / 'weights.pth').rename(tmp_path / f'resnet18-{digest}.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))

    said = on_two_ranks(CODE.format(url=file.as_uri()), tmp_path)

    first, second = ([tuple(map(float, line.split()[1:])) for line in s.splitlines() if 'CALL' in line] for s in said)
    assert second[0][0] >= first[0][1]
    assert second[1][0] < first[1][1]  # where nothing is downloaded, nobody waits
    assert (len(first), len(second)) == (3, 2)  # the second rank found the file
    assert [line for s in said for line in s.splitlines() if 'BIAS' in line] == 2 * [f'BIAS {source.fc.bias.sum()}']
