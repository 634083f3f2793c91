import json
import os
import pickle

import pytest
import tokenizers
import torch
from composer import Trainer
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from composer_kd.checkpoints import CheckpointError
from composer_kd.data.text_files import TextError
from composer_kd.tokenization import TextEncoder, begins_word, load_tokenizer, tokenizer_difference, tokenizer_digest
from helpers import in_forks, shared_data
from text_runs import tiny_bert, write_vocabulary

TEXTS = ['W1 w2, w3! abc', 'Ärger über w17', '[MASK] w5 [SEP]', '', '...', '一二 w9']


@pytest.fixture
def vocabulary(tmp_path):
    return write_vocabulary(tmp_path)


def same(one, other):
    assert tokenizer_difference(one, other) is None
    assert tokenizer_digest(one) == tokenizer_digest(other)
    assert [one(text)['input_ids'] for text in TEXTS] == [other(text)['input_ids'] for text in TEXTS]
    assert one('w1', 'w2')['input_ids'] == other('w1', 'w2')['input_ids']


def test_every_source_gives_the_same(tmp_path, vocabulary):
    one = load_tokenizer(str(vocabulary))
    assert one('W1 abc!')['input_ids'] == one.convert_tokens_to_ids(
        ['[CLS]', 'w1', 'a', '##b', '##c', '[UNK]', '[SEP]']
    )
    folder = tmp_path / 'saved'
    one.save_pretrained(folder)
    same(one, load_tokenizer(str(folder)))
    same(one, load_tokenizer(str(folder / 'tokenizer.json')))
    same(one, load_tokenizer(str(folder / 'vocab.txt')))
    (tmp_path / 'alone').mkdir()
    (folder / 'tokenizer.json').rename(tmp_path / 'alone' / 'tokenizer.json')
    alone = load_tokenizer(str(tmp_path / 'alone' / 'tokenizer.json'))
    same(one, alone)
    assert alone.mask_token_id == one.mask_token_id == 4

    model = tiny_bert(one)
    trainer = Trainer(model=model, optimizers=torch.optim.SGD(model.parameters()), progress_bar=False)
    trainer.save_checkpoint(str(tmp_path / 'run' / 'checkpoints' / 'ep1.pt'))
    trainer.close()
    (tmp_path / 'run' / 'checkpoints' / 'latest-rank0.pt').symlink_to('ep1.pt')
    same(one, load_tokenizer(str(tmp_path / 'run' / 'checkpoints' / 'ep1.pt')))
    from_run = load_tokenizer(str(tmp_path / 'run'))
    same(one, from_run)
    assert from_run.name_or_path == str(tmp_path / 'run' / 'checkpoints' / 'ep1.pt')
    from_run.save_pretrained(tmp_path / 'again')
    same(one, AutoTokenizer.from_pretrained(tmp_path / 'again'))


def test_what_is_no_tokenizer(tmp_path, vocabulary):
    def refused(source, error, message):
        with pytest.raises(error, match=message) as caught:
            load_tokenizer(str(source))
        assert '\n' not in str(caught.value)
        assert str(source) in str(caught.value)

    for name in ('nowhere.txt', 'nowhere.json', 'nowhere.pt', 'nowhere'):
        refused(tmp_path / name, FileNotFoundError, 'no such file or folder')
    for name in ('bad.txt', 'bad.json', 'folder/tokenizer.json', 'folder/tokenizer_config.json'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"no": "tokenizer"}')
        refused(tmp_path / name, ValueError, 'no tokenizer in ')
    refused(tmp_path / 'folder', ValueError, 'no tokenizer in ')
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', ValueError, 'no tokenizer in ')
    (tmp_path / 'bad.pt').write_bytes(b'no checkpoint')
    refused(tmp_path / 'bad.pt', CheckpointError, 'damaged')
    torch.save({'state': {'model': {}}}, tmp_path / 'images.pt')
    refused(tmp_path / 'images.pt', CheckpointError, 'holds no tokenizer')


def test_a_checkpoint_writes_nowhere_else(tmp_path, vocabulary):
    """Names of files in a checkpoint are somebody's word."""
    outside = tmp_path / 'outside.json'
    content = json.loads(load_tokenizer(str(vocabulary)).backend_tokenizer.to_str())
    files = {
        str(outside): {'file_extension': '.json', 'content': {}},
        '../outside.json': {'file_extension': '.json', 'content': {}},
        'code.py': {'file_extension': '.py', 'content': 'raise SystemExit'},
        'tokenizer.json': {'file_extension': '.json', 'content': content},
        'tokenizer_config.json': {
            'file_extension': '.json',
            'content': {'tokenizer_class': 'BertTokenizerFast', 'mask_token': '[MASK]'},
        },
    }
    torch.save({'state': {'integrations': {'huggingface': {'tokenizer': files}}}}, tmp_path / 'a.pt')
    same(load_tokenizer(str(tmp_path / 'a.pt')), load_tokenizer(str(vocabulary)))
    assert not outside.exists()
    files['tokenizer_config.json']['content']['auto_map'] = []
    torch.save({'state': {'integrations': {'huggingface': {'tokenizer': files}}}}, tmp_path / 'a.pt')
    assert 'auto_map' not in load_tokenizer(str(tmp_path / 'a.pt')).init_kwargs
    files['tokenizer_config.json']['content'] = {'auto_map': {'AutoTokenizer': ['code.Tokenizer', None]}}
    torch.save({'state': {'integrations': {'huggingface': {'tokenizer': files}}}}, tmp_path / 'b.pt')
    with pytest.raises(ValueError, match=r'no tokenizer in .*b\.pt'):
        load_tokenizer(str(tmp_path / 'b.pt'))


@pytest.mark.parametrize('source', ['.', 'tokenizer.json'])
def test_code_in_a_folder_is_not_run(tmp_path, vocabulary, monkeypatch, source):
    folder = tmp_path / 'theirs'
    load_tokenizer(str(vocabulary)).save_pretrained(folder)
    (folder / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nclass Evil: pass\n')
    config = {'tokenizer_class': 'Evil', 'auto_map': {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr('builtins.input', lambda question: asked.append(question) or 'y')
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules'))
    with pytest.raises(ValueError, match=r'no tokenizer in .*theirs.*: The repository .* contains custom code'):
        load_tokenizer(str(folder / source))
    assert not asked and not (tmp_path / 'ran').exists()


def test_a_name_on_the_hub_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('transformers.utils.hub._is_offline_mode', True)
    with pytest.raises(FileNotFoundError) as caught:
        load_tokenizer('someone/bert')
    assert str(caught.value).startswith(
        "no tokenizer 'someone/bert': no such file or folder here, and the Hugging Face"
    )
    assert '\n' not in str(caught.value)


def say_digests(*sources):
    for text, vocabulary in sources:
        print(tokenizer_digest(load_tokenizer({'text': text, 'vocabulary': vocabulary})))


def test_training_gives_the_same_in_every_process(tmp_path):
    (tmp_path / 'own.txt').write_text('abab abba bab\ncab bac ab\n' * 3)  # full of ties
    sources = {'python_docs': 2000, str(tmp_path / 'own.txt'): 60}
    # Its strings have other hashes: it is a fork of a Python that was started anew.
    (said,) = in_forks(say_digests, [[*sources.items()]], [os.environ.copy()])
    trained = [load_tokenizer({'text': text, 'vocabulary': vocabulary}) for text, vocabulary in sources.items()]
    assert said.split() == [tokenizer_digest(tokenizer) for tokenizer in trained]


def test_a_trained_tokenizer_is_one_of_bert(tmp_path):
    tokenizer = load_tokenizer({'text': 'python_docs', 'vocabulary': 1000})
    assert len(tokenizer) == 1000
    assert isinstance(tokenizer, BertTokenizerFast)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    ids = tokenizer('The Definition of a CLASS')['input_ids']
    assert tokenizer.decode(ids) == '[CLS] the definition of a class [SEP]'
    assert tokenizer.unk_token_id not in ids
    assert len(ids) < 12
    tokenizer.save_pretrained(tmp_path)
    same(tokenizer, load_tokenizer(str(tmp_path)))
    # Whoever changes what they get changes no one else's.
    tokenizer.add_tokens('class of')
    assert tokenizer_difference(load_tokenizer({'text': 'python_docs', 'vocabulary': 1000}), tokenizer)


def test_training_options(tmp_path):
    for bad in ({'text': 'python_docs'}, {'text': 'python_docs', 'vocabulary': '9'}, {'txt': 'a', 'vocabulary': 9}):
        with pytest.raises(ValueError, match=r'a tokenizer to train is \{text: \.\.\., vocabulary: \.\.\.\}'):
            load_tokenizer(bad)
    with pytest.raises(ValueError, match=r'a vocabulary of 50 has no room for the characters of python_docs: take \d+'):
        load_tokenizer({'text': 'python_docs', 'vocabulary': 50})
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        load_tokenizer({'text': str(tmp_path / 'nowhere'), 'vocabulary': 50})


def test_training_on_another_key(tmp_path):
    path = tmp_path / 'own.jsonl'
    path.write_text('{"content": "abab abba"}\n' * 3)
    source = {'text': str(path), 'vocabulary': 60}
    with pytest.raises(TextError, match=r"line 1: no JSON object with the key 'text' \(see tokenizer\.text_key\)"):
        load_tokenizer(source)
    assert 'abab' in load_tokenizer({**source, 'text_key': 'content'}).get_vocab()
    path.write_text('{"content": "abab abba"}\n' * 3 + 'no JSON\n')
    with pytest.raises(TextError, match=r'line 4: not JSON .*; repair it, or set tokenizer\.on_error=skip to leave'):
        load_tokenizer({**source, 'vocabulary': 61, 'text_key': 'content'})
    with pytest.warns(UserWarning, match='left out 1 lines'):
        load_tokenizer({**source, 'text_key': 'content', 'on_error': 'skip'})
    with pytest.raises(ValueError, match=r"unknown tokenizer\.on_error 'ignore': choose fail or skip"):
        load_tokenizer({**source, 'on_error': 'ignore'})


def variant(tokenizer, change):
    """The tokenizer with a change to its JSON."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    raw = tokenizers.Tokenizer.from_str(json.dumps(content))
    special = {f'{name}_token': f'[{name.upper()}]' for name in ('pad', 'unk', 'cls', 'sep', 'mask')}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def rename(content):
    content['model']['vocab']['v17'] = content['model']['vocab'].pop('w17')


def swap(content):
    words = content['model']['vocab']
    words['w1'], words['w2'] = words['w2'], words['w1']


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        (lambda c: c.update(truncation=None), None),
        (lambda c: c['normalizer'].update(strip_accents=True), None),
        (lambda c: c['model']['vocab'].pop('w399'), '477 words against 476'),
        (rename, "the word of id 94 is 'w17' against 'v17'"),
        (swap, "the word of id 78 is 'w1' against 'w2'"),
        (lambda c: c['normalizer'].update(lowercase=False), 'lower-casing'),
        (lambda c: c['normalizer'].update(handle_chinese_chars=False), 'how text is normalized'),
        (lambda c: c.update(pre_tokenizer={'type': 'WhitespaceSplit'}), 'how text is split into words'),
        (lambda c: c['model'].update(max_input_chars_per_word=5), 'how words are split into pieces'),
        (lambda c: c['post_processor']['single'].pop(), 'the tokens around a text'),
    ],
)
def test_differences(vocabulary, change, difference):
    one = load_tokenizer(str(vocabulary))
    other = variant(one, change)
    assert tokenizer_difference(one, other) == difference
    assert (tokenizer_digest(one) == tokenizer_digest(other)) == (difference is None)


def test_added_and_special_tokens_differ(vocabulary):
    one, other = load_tokenizer(str(vocabulary)), load_tokenizer(str(vocabulary))
    other.add_tokens('w1 w2')
    assert tokenizer_difference(one, other) == '477 words against 478'
    other = load_tokenizer(str(vocabulary))
    other.mask_token = 'w1'
    assert tokenizer_difference(one, other) in ('added tokens', 'special tokens')


def test_encodes_text_as_text(vocabulary):
    """Neither settings of the tokenizer matter, nor do they change; and text cannot say [MASK]."""
    tokenizer = load_tokenizer(str(vocabulary))
    tokenizer('w1 w2 w3 w4', truncation=True, max_length=4, padding='max_length')
    settings = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    assert None not in settings
    encode = TextEncoder(tokenizer)
    assert encode('w1 w2 w3 w4') == tokenizer.convert_tokens_to_ids(['w1', 'w2', 'w3', 'w4'])
    assert not set(encode('w1 [MASK] [SEP] [PAD]')) & {0, 2, 3, 4}
    assert pickle.loads(pickle.dumps(encode))('[MASK] w1') == encode('[MASK] w1')
    assert tokenizer_difference(tokenizer, load_tokenizer(str(vocabulary))) is None
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == settings
    assert tokenizer('[MASK]')['input_ids'][1] == 4


def test_begins_word(vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    begins = begins_word(tokenizer)
    assert begins[tokenizer.convert_tokens_to_ids(['w1', 'a', '##a', '[CLS]'])].tolist() == [True, True, False, True]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0, 'a': 1}, unk_token='[UNK]'))
    with pytest.raises(ValueError, match='whole_word_masking needs pieces that tell whether they continue a word'):
        begins_word(PreTrainedTokenizerFast(tokenizer_object=raw))


def test_the_vocabulary_of_bert():
    tokenizer = load_tokenizer(str(shared_data('text') / 'bert_uncased_vocab.txt'))
    assert len(tokenizer) == 30_522
    assert tokenizer('Hello, world!')['input_ids'] == [101, 7592, 1010, 2088, 999, 102]


def test_a_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer = load_tokenizer(str(write_vocabulary(tmp_path)))
    assert load_tokenizer(tokenizer) is tokenizer
