from pathlib import Path

import pytest
import torch
from composer import Trainer
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from composer_kd import cli, models
from composer_kd.export import export
from helpers import TINY_BERT, make_vocabulary, train_one_batch

LOADERS = {'masked_lm': AutoModelForMaskedLM, 'text_classifier': AutoModelForSequenceClassification}


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(name, **more):
    """A run of one batch; its model."""
    torch.manual_seed(0)
    model = getattr(models, name)(config=TINY_BERT, tokenizer=make_vocabulary('vocab.txt'), **more)
    ids = torch.randint(5, 70, (4, 8))
    labels = ids if name == 'masked_lm' else torch.tensor([0, 1, 2, 0])
    train_one_batch(model, ids, labels, 'runs/x/checkpoints')
    return model.eval(), {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}


@pytest.mark.parametrize('name', LOADERS)
def test_what_is_exported_is_the_same_model(name, capsys):
    model, inputs = train(name, **({'num_labels': 3} if name == 'text_classifier' else {}))
    assert cli.main(['export', 'runs/x', 'out/model']) == 0
    out = capsys.readouterr().out
    assert out == f'out/model: {LOADERS[name].__name__}.from_pretrained and AutoTokenizer.from_pretrained load it\n'
    assert {path.name for path in Path('out').iterdir()} == {'model'}
    assert Path('out/model/model.safetensors').is_file() and not [*Path('out/model').glob('*.bin')]
    network, info = LOADERS[name].from_pretrained('out/model', output_loading_info=True)
    assert not any(info.values())
    assert type(network) is type(model.model)
    assert network.config.architectures == [type(network).__name__]
    with torch.no_grad():
        assert torch.equal(network.eval()(**inputs).logits, model(inputs)['logits'])
    tokenizer = AutoTokenizer.from_pretrained('out/model')
    assert tokenizer('abc d', 'e').input_ids == model.tokenizer('abc d', 'e').input_ids
    assert tokenizer.model_max_length == TINY_BERT['max_position_embeddings']

    again = getattr(models, name)('out/model', **({'num_labels': 3} if name == 'text_classifier' else {})).eval()
    with torch.no_grad():
        assert torch.equal(again(inputs)['logits'], model(inputs)['logits'])


def test_mistakes_are_one_line_and_leave_nothing(capsys):
    train('masked_lm')
    Path('there').mkdir()
    Path('x.pt').write_text('no checkpoint')
    vision = models.small_convnet(width=2)
    trainer = Trainer(model=vision, optimizers=torch.optim.SGD(vision.parameters(), lr=0.1), progress_bar=False)
    trainer.save_checkpoint('vision.pt')
    trainer.close()
    capsys.readouterr()
    for checkpoint, folder, message in [
        ('runs/x', 'there', 'there is there already: choose another folder, or delete it'),
        ('runs/y', 'new', 'runs/y: there is no checkpoint, neither a file nor the folder of a run with one'),
        ('x.pt', 'new', f'{Path.cwd()}/x.pt: damaged, or no checkpoint at all'),
        ('vision.pt', 'new', f'{Path.cwd()}/vision.pt: holds no network of Hugging Face, so no text model'),
    ]:
        before = sorted(Path().rglob('*'))
        assert cli.main(['export', checkpoint, folder]) == 1
        assert capsys.readouterr() == ('', f'{message}\n')
        assert sorted(Path().rglob('*')) == before


def test_a_network_that_was_changed_is_refused():
    train('masked_lm')
    path = next(Path('runs/x/checkpoints').glob('ep*'))
    saved = torch.load(path, weights_only=False)
    weights = saved['state']['model']
    weights['model.bert.adapter.weight'] = weights['model.bert.embeddings.LayerNorm.weight']
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match=r'ep0-ba1-rank0.pt: its weights are of no bert that transformers knows$'):
        export('runs/x', 'out')


def test_an_export_that_fails_leaves_nothing(monkeypatch):
    train('masked_lm')
    before = sorted(Path().rglob('*'))
    monkeypatch.setattr(
        'transformers.PreTrainedTokenizerFast.save_pretrained', lambda *_: (_ for _ in ()).throw(OSError('full'))
    )
    with pytest.raises(OSError, match='full'):
        export('runs/x', 'out')
    assert sorted(Path().rglob('*')) == before
