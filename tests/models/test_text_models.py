import inspect
import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import typeguard
from composer import Trainer
from composer.models import HuggingFaceModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertForPreTraining

from composer_kd import models
from composer_kd.checkpoints import CheckpointError
from helpers import TINY_BERT, make_glue, make_vocabulary, on_two_ranks

VOCABULARY = 77


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    return make_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'vocab.txt')


def batch(size=4, length=12, labels=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (size, length), generator=generator)
    labels = ids.clone() if labels is None else labels
    return {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': labels}


def logits(model):
    model.eval()
    inputs = {name: value for name, value in batch().items() if name != 'labels'}
    with torch.no_grad():
        return model(inputs)['logits']


def train(model, folder, data):
    """A step of a real Trainer, which leaves a checkpoint in the folder of a run."""
    rows = [{name: value[index] for name, value in data.items()} for index in range(len(data['labels']))]
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(rows, batch_size=len(rows)),
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.01),
        max_duration='1ba',
        save_folder=str(folder / 'checkpoints'),
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return str(folder)


@pytest.fixture(scope='module')
def language_model(vocabulary, tmp_path_factory):
    """A masked language model of four layers, and the folder of its run."""
    torch.manual_seed(1)
    model = models.masked_lm(config=TINY_BERT | {'num_hidden_layers': 4}, tokenizer=vocabulary)
    return model, train(model, tmp_path_factory.mktemp('mlm') / 'run', batch())


@pytest.fixture(scope='module')
def classifier(vocabulary, tmp_path_factory):
    """A classifier with three classes, and the folder of its run."""
    torch.manual_seed(2)
    model = models.text_classifier(config=TINY_BERT, tokenizer=vocabulary, num_labels=3)
    return model, train(model, tmp_path_factory.mktemp('classifier') / 'run', batch(labels=torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize('name', ['masked_lm', 'text_classifier'])
def test_signature_can_check_arguments(name):
    parameters = inspect.signature(getattr(models, name)).parameters
    for parameter in parameters.values():
        typeguard.check_type(parameter.default, parameter.annotation)
    for argument, value in (('pretrained', 3), ('config', 'bert'), ('every_kth_layer', 'two')):
        with pytest.raises(typeguard.TypeCheckError):
            typeguard.check_type(value, parameters[argument].annotation)


def test_from_scratch_the_config_decides(vocabulary):
    torch.manual_seed(5)
    one = models.masked_lm(config=TINY_BERT | {'hidden_dropout_prob': 0.3}, tokenizer=vocabulary)
    torch.manual_seed(5)
    two = models.masked_lm(config=TINY_BERT | {'hidden_dropout_prob': 0.3}, tokenizer=vocabulary)
    assert isinstance(one, HuggingFaceModel) and type(one.model).__name__ == 'BertForMaskedLM'
    assert (one.config.vocab_size, one.config.pad_token_id) == (VOCABULARY, 0)
    assert (one.config.hidden_size, one.config.hidden_dropout_prob) == (16, 0.3)
    assert torch.equal(logits(one), logits(two))
    assert len(one.tokenizer) == VOCABULARY
    padded = models.masked_lm(config=TINY_BERT | {'vocab_size': 80}, tokenizer=vocabulary)
    assert padded.model.get_input_embeddings().weight.shape == (80, 16)


@pytest.mark.parametrize(
    'kind', ['bert', 'roberta', 'distilbert', 'electra', 'albert', 'modernbert', 'deberta-v2', 'mpnet']
)
def test_kinds_of_networks(kind, vocabulary, tmp_path):
    config = {'model_type': kind} | TINY_BERT
    if kind == 'distilbert':
        config = {'model_type': kind, 'dim': 16, 'n_layers': 2, 'n_heads': 2, 'hidden_dim': 32}
    if kind in ('albert', 'electra'):
        config['embedding_size'] = 16
    model = models.masked_lm(config=config, tokenizer=vocabulary)
    model.model.save_pretrained(tmp_path)
    loaded = models.text_classifier(str(tmp_path), tokenizer=vocabulary)
    trained, taken = model.model.base_model.state_dict(), loaded.model.base_model.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in taken.items() if 'pooler' not in key)
    assert logits(loaded).shape == (4, 2)


@pytest.mark.parametrize('source', ['run', 'file', 'folder'])
def test_a_pretrained_network_is_the_same_network(language_model, source, tmp_path):
    model, run = language_model
    if source == 'file':
        run = f'{run}/checkpoints/ep0-ba1-rank0.pt'
    if source == 'folder':
        run = str(tmp_path)
        model.model.save_pretrained(run)
        model.tokenizer.save_pretrained(run)
    loaded = models.masked_lm(run)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    weights = loaded.model
    assert weights.get_output_embeddings().weight is weights.get_input_embeddings().weight  # tied, as they were
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in weights.parameters())


def test_a_pretrained_network_may_change_its_dropout_but_not_its_shape(language_model):
    model, run = language_model
    loaded = models.masked_lm(run, config={'hidden_dropout_prob': 0.5})
    assert loaded.model.bert.embeddings.dropout.p == 0.5
    assert torch.equal(logits(loaded), logits(model))
    for config, message in [
        ({'hidden_size': 32}, 'of another shape there: bert.embeddings.word_embeddings.weight, '),
        ({'num_hidden_layers': 2}, 'the network has no place for bert.encoder.layer.2.attention'),
        ({'num_hidden_layers': 5}, 'it has no bert.encoder.layer.4.attention.output.LayerNorm.bias, '),
    ]:
        for build in (models.masked_lm, models.text_classifier):
            with pytest.raises(ValueError, match=rf'^{run}/checkpoints/ep0-ba1-rank0.pt does not fit .*: {message}'):
                build(run, config=config)


def test_the_head_of_a_classifier_is_drawn_from_the_seed(language_model):
    model, run = language_model
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        classifier = models.text_classifier(run, num_labels=3)
        heads.append(classifier.model.classifier.weight)
        trained = model.model.bert.state_dict()
        taken = classifier.model.bert.state_dict()
        assert {key for key in taken if key not in trained} == {'pooler.dense.weight', 'pooler.dense.bias'}
        assert all(torch.equal(taken[key], trained[key]) for key in trained)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert classifier.num_classes == classifier.config.num_labels == 3
    assert classifier.config.problem_type == 'single_label_classification'
    assert classifier.get_metrics(is_train=True) == {}


def test_from_a_classifier_the_head_is_taken_where_it_fits(classifier):
    model, run = classifier
    same = models.text_classifier(run, num_labels=3)
    assert torch.equal(logits(same), logits(model))
    for labels in (1, 2):
        other = models.text_classifier(run, num_labels=labels)
        assert other.model.classifier.weight.shape == (labels, 16)
        assert all(
            torch.equal(value, model.model.bert.state_dict()[key])
            for key, value in other.model.bert.state_dict().items()
        )
    assert models.text_classifier(run, num_labels=1).config.problem_type == 'regression'
    with pytest.raises(ValueError, match=r'does not fit BertForMaskedLM with this config: it has no cls.predictions'):
        models.masked_lm(run)


def test_an_encoder_without_a_head_is_checked_as_well(language_model, vocabulary, tmp_path):
    model, _ = language_model
    model.model.bert.save_pretrained(tmp_path)
    models.text_classifier(str(tmp_path), tokenizer=vocabulary)
    with pytest.raises(ValueError, match=r'the network has no place for (bert\.)?encoder.layer.2'):
        models.text_classifier(str(tmp_path), tokenizer=vocabulary, config={'num_hidden_layers': 2})
    with pytest.raises(ValueError, match=r'it has no cls.predictions'):
        models.masked_lm(str(tmp_path), tokenizer=vocabulary)


def test_a_network_as_the_oldest_on_the_hub_are(vocabulary, tmp_path):
    """With a head for the next sentence, names of old, a buffer among the weights, and no safetensors."""
    model = models.masked_lm(config=TINY_BERT, tokenizer=vocabulary)
    source = BertForPreTraining(model.config)
    weights = {
        key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): value
        for key, value in source.state_dict().items()
    }
    weights['bert.embeddings.position_ids'] = torch.arange(64)[None]
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    model.config.save_pretrained(tmp_path)
    source.eval()
    inputs = {name: value for name, value in batch().items() if name != 'labels'}
    with torch.no_grad():
        expected = source(**inputs).prediction_logits
    assert torch.equal(logits(models.masked_lm(str(tmp_path), tokenizer=vocabulary)), expected)
    classifier = models.text_classifier(str(tmp_path), tokenizer=vocabulary)
    trained = source.bert.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in classifier.model.bert.state_dict().items())


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_every_kth_layer(language_model, k):
    model, run = language_model
    student = models.masked_lm(run, every_kth_layer=k)
    layers, kept = model.model.bert.encoder.layer, student.model.bert.encoder.layer
    assert len(kept) == student.config.num_hidden_layers == len(range(0, 4, k))
    for layer, source in zip(kept, layers[::k], strict=True):
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in layer.state_dict().items())
    for part in ('bert.embeddings', 'cls'):
        own, source = student.model.get_submodule(part).state_dict(), model.model.get_submodule(part).state_dict()
        assert all(torch.equal(own[key], source[key]) for key in source)
    assert torch.equal(logits(student), logits(model)) == (k == 1)


def test_every_kth_layer_of_what_has_none(language_model, vocabulary):
    _, run = language_model
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf'every_kth_layer must be from 1 to the number of layers, 4, not {k}$'):
            models.masked_lm(run, every_kth_layer=k)
    albert = TINY_BERT | {'model_type': 'albert', 'embedding_size': 16}
    with pytest.raises(ValueError, match=r'^every_kth_layer: albert has no row of 2 layers$'):
        models.masked_lm(config=albert, tokenizer=vocabulary, every_kth_layer=2)


SCORES = {
    'accuracy': ('MulticlassAccuracy', 3, lambda y, p: sklearn.metrics.accuracy_score(y, p.argmax(1))),
    'f1': ('BinaryF1Score', 2, lambda y, p: sklearn.metrics.f1_score(y, p.argmax(1))),
    'matthews': ('MatthewsCorrCoef', 2, lambda y, p: sklearn.metrics.matthews_corrcoef(y, p.argmax(1))),
    'matthews of 3': ('MatthewsCorrCoef', 3, lambda y, p: sklearn.metrics.matthews_corrcoef(y, p.argmax(1))),
    'pearson': ('PearsonCorrCoef', 1, lambda y, p: scipy.stats.pearsonr(y, p[:, 0])[0]),
    'spearman': ('SpearmanCorrCoef', 1, lambda y, p: scipy.stats.spearmanr(y, p[:, 0])[0]),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', SCORES)
def test_metrics_are_those_of_sklearn_and_scipy(case, dtype, vocabulary, monkeypatch):
    name, labels, expected = SCORES[case]
    model = models.text_classifier(config=TINY_BERT, tokenizer=vocabulary, num_labels=labels, metrics=[case.split()[0]])
    assert [*model.get_metrics()] == [name]
    monkeypatch.setattr(model, 'forward', lambda batch: {'logits': batch['said']})
    rng = np.random.default_rng(3)
    said = torch.tensor(rng.normal(size=(101, labels)), dtype=dtype)
    if labels == 1:
        truth = torch.tensor(rng.choice(11, 101) / 2, dtype=torch.float32)
        said += truth[:, None].to(dtype)
    else:
        truth = torch.tensor(rng.integers(labels, size=101))
    metric = model.get_metrics()[name]
    for part in (slice(0, 1), slice(1, 40), slice(40, 100), slice(100, 101)):
        outputs = model.eval_forward(given := {'said': said[part], 'labels': truth[part]})
        model.update_metric(given, outputs, metric)
    assert metric.compute().item() == pytest.approx(expected(truth.numpy(), said.float().numpy()), abs=2e-6)


@pytest.mark.parametrize('classes', [2, 3])
@pytest.mark.parametrize('said', [0, 1])
def test_matthews_of_a_constant_answer_is_zero(classes, said):
    from composer_kd.models.matthews import MatthewsCorrCoef

    metric = MatthewsCorrCoef(classes)
    metric.update(torch.eye(classes)[[said] * 6], torch.tensor([0, 1, 1, 0, 1, classes - 1]))
    assert metric.compute() == 0.0
    metric.reset()
    metric.update(torch.eye(classes)[[0, 1, 1]], torch.tensor([0, 1, 1]))
    assert metric.compute() == 1.0


def test_grades_are_learned_by_squared_error(vocabulary):
    torch.manual_seed(0)
    model = models.text_classifier(config=TINY_BERT, tokenizer=vocabulary, num_labels=1).eval()
    assert [*model.get_metrics()] == ['PearsonCorrCoef', 'SpearmanCorrCoef']
    given = batch(labels=torch.tensor([0.0, 2.5, 5.0, 1.0]))
    loss = model.loss(model(given), given)
    assert loss.item() == pytest.approx(((logits(model)[:, 0] - given['labels']) ** 2).mean().item(), rel=1e-6)


MISTAKES = {
    'key': ({'config': {'hiden_size': 3}}, "config: bert has no 'hiden_size'; did you mean 'hidden_size'?"),
    'kind': ({'config': {'model_type': 'brt'}}, "config: there is no model_type 'brt'; did you mean 'bert'?"),
    'type': ({'config': {'hidden_size': '3'}}, "config: hidden_size must be like 768, not '3'"),
    'bool': ({'config': {'hidden_size': True}}, 'config: hidden_size must be like 768, not True'),
    'heads': ({'config': {'hidden_size': 17}}, 'The hidden size (17) is not a multiple of'),
    'words': ({'config': {'vocab_size': 20}}, 'the tokenizer has 77 words, the network 20 (config.vocab_size)'),
    'no tokenizer': ({'tokenizer': None}, 'a new network needs a `tokenizer`, and a trained one is given by'),
    'metric': (
        {'metrics': ['pearson']},
        "metrics: 'pearson' is not for num_labels=2; there are: accuracy, f1, matthews",
    ),
    'f1': ({'metrics': ['f1'], 'num_labels': 3}, "metrics: 'f1' is not for num_labels=3; there are: "),
    'labels': ({'num_labels': 0}, 'num_labels must be 1 or more, not 0'),
    'no classifier': ({'config': {'model_type': 'blip_2_qformer', 'vocab_size': 100}}, 'transformers has no'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(mistake, vocabulary):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        models.text_classifier(**{'tokenizer': vocabulary, 'config': TINY_BERT, **arguments})
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)


def test_what_is_not_there_is_one_line(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in ('bert-base-uncasd', 'runs/mnli'):
        with pytest.raises(OSError, match=rf'^{name} is no file or folder here, and cannot be had from') as error:
            models.masked_lm(name)
        assert '\n' not in str(error.value) and 'HF_HOME' in str(error.value)
    for name in ('a/b/c', '/no/such', 'no.pt'):
        with pytest.raises(FileNotFoundError, match=rf'^{name}: no such file or folder$'):
            models.masked_lm(name)
    with pytest.raises(OSError, match=rf'^{tmp_path}: is no pretrained network that can be used: ') as error:
        models.masked_lm(str(tmp_path))
    assert '\n' not in str(error.value)


def test_a_checkpoint_of_something_else(tmp_path, vocabulary):
    model = models.small_convnet(width=2)
    trainer = Trainer(model=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1), progress_bar=False)
    trainer.save_checkpoint(str(tmp_path / 'vision.pt'))
    trainer.close()
    torch.save(
        {
            'state': {
                'integrations': {'huggingface': {'model': {'config': {'content': {'model_type': 'x'}}}}},
                'model': {},
            }
        },
        tmp_path / 'x.pt',
    )
    (tmp_path / 'y.pt').write_text('no checkpoint')
    for name, message in [
        ('vision', 'holds no network of Hugging Face, so no text model'),
        ('x', "holds a network of a kind that transformers does not know: 'x'"),
        ('y', 'damaged, or no checkpoint at all'),
    ]:
        with pytest.raises(CheckpointError, match=rf'^{tmp_path}/{name}.pt: {message}'):
            models.masked_lm(str(tmp_path / f'{name}.pt'), tokenizer=vocabulary)


class Runs:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path('it-ran'),)


def test_weights_that_would_run_code_are_refused(language_model, vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = language_model
    model.model.save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    torch.save({'bert.embeddings.word_embeddings.weight': Runs()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(OSError, match=r'is no pretrained network that can be used: ') as error:
        models.masked_lm(str(tmp_path), tokenizer=vocabulary)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'it-ran').exists()
    torch.save(model.model.state_dict(), tmp_path / 'pytorch_model.bin')
    assert torch.equal(logits(models.masked_lm(str(tmp_path), tokenizer=vocabulary)), logits(model))


def test_code_that_comes_with_a_network_is_not_run(vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {'model_type': 'mine', 'auto_map': {'AutoConfig': 'own.Config', 'AutoModelForMaskedLM': 'own.Model'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'own.py').write_text('import pathlib\npathlib.Path("it-ran").touch()\n')
    with pytest.raises(OSError, match=r'is no pretrained network that can be used: .* contains custom code'):
        models.masked_lm(str(tmp_path), tokenizer=vocabulary)
    assert not (tmp_path / 'it-ran').exists()


def test_half_precision_weights_are_trained_in_full(language_model, vocabulary, tmp_path):
    model, _ = language_model
    half = AutoModelForMaskedLM.from_config(model.config).half()
    half.save_pretrained(tmp_path)
    assert load_file(tmp_path / 'model.safetensors')['bert.embeddings.word_embeddings.weight'].dtype == torch.float16
    loaded = models.masked_lm(str(tmp_path), tokenizer=vocabulary)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


DOWNLOAD = """
import time, transformers
from composer_kd import models
from composer_kd.models import text_models

def noted(name, function):
    def call(source, **more):
        begin = time.monotonic()
        time.sleep(1 - dist.get_local_rank())
        result = function('model' if source == 'org/model' else source, **more)
        print('CALL', name, begin, time.monotonic())
        return result
    return call

transformers.AutoConfig.from_pretrained = noted('config', transformers.AutoConfig.from_pretrained)
transformers.BertForMaskedLM.from_pretrained = noted('weights', transformers.BertForMaskedLM.from_pretrained)
text_models.load_tokenizer = noted('tokenizer', lambda source: load_tokenizer(source))
load_tokenizer = lambda source: transformers.AutoTokenizer.from_pretrained(source)
models.masked_lm('org/model')
"""


def test_a_network_is_downloaded_by_the_first_rank_of_a_machine(language_model, tmp_path):
    model, _ = language_model
    model.model.save_pretrained(tmp_path / 'model')
    model.tokenizer.save_pretrained(tmp_path / 'model')
    said = on_two_ranks(DOWNLOAD, tmp_path)
    first, second = ([line.split()[1:] for line in out.splitlines() if 'CALL' in line] for out in said)
    assert [name for name, *_ in first] == [name for name, *_ in second] == ['config', 'tokenizer', 'weights']
    for one, other in zip(first, second, strict=True):
        assert float(other[1]) >= float(one[2])


EVALUATE = """
import torch
from composer import Trainer
from composer_kd import data, models

for task, labels, metrics in [('mrpc', 2, ['f1', 'accuracy', 'matthews']), ('stsb', 1, None)]:
    torch.manual_seed(0)
    model = models.text_classifier('model', num_labels=labels, metrics=metrics)
    torch.nn.init.normal_(model.model.classifier.weight)
    spec = data.glue('validation', BATCH, task=task, tokenizer='model', data_dir='glue')
    trainer = Trainer(
        model=model,
        eval_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        progress_bar=False,
    )
    trainer.eval()
    print('METRICS', *(f'{name}={value.compute():.3f}' for name, value in trainer.state.eval_metrics['eval'].items()))
    trainer.close()
"""


def test_two_ranks_measure_what_one_does(language_model, tmp_path, capsys, monkeypatch):
    """Also where the examples do not divide by the ranks, nor by the batches."""
    monkeypatch.chdir(tmp_path)
    model, _ = language_model
    model.model.save_pretrained('model')
    model.tokenizer.save_pretrained('model')
    make_glue('glue', validation=11)
    exec(EVALUATE.replace('BATCH', '11'), {})
    alone = [line for line in capsys.readouterr().out.splitlines() if 'METRICS' in line]
    assert [line.count('=') for line in alone] == [3, 2]
    for out in on_two_ranks(EVALUATE.replace('BATCH', '4'), tmp_path):
        assert [line for line in out.splitlines() if 'METRICS' in line] == alone
