"""A small world of text: files, a vocabulary and a network, and runs with them."""

import gzip
import hashlib
import json
import shutil

import numpy as np
import torch
from composer import Callback, Trainer
from composer.models import HuggingFaceModel
from transformers import BertConfig, BertForMaskedLM

from composer_kd import data
from composer_kd.memory import end_workers

WORDS = 400


def write_vocabulary(folder):
    """A `vocab.txt` of whole words, `w0`, `w1` and so on, and of letters."""
    letters = [prefix + letter for prefix in ('', '##') for letter in 'abcdefghijklmnopqrstuvwxyz0123456789']
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *(f'w{number}' for number in range(WORDS))]
    path = folder / 'vocab.txt'
    path.write_text('\n'.join(words) + '\n')
    return path


def write_shards(folder, sizes, longest=12, packed=True):
    """A folder of JSON lines files with so many documents each: 3 to `longest` words, and no two alike."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard, documents in enumerate(sizes):
        lines = []
        for _ in range(documents):
            words = random.integers(WORDS, size=random.integers(3, longest + 1))
            lines.append(json.dumps({'text': ' '.join(f'w{word}' for word in words)}))
        content = ''.join(f'{line}\n' for line in lines).encode()
        name = f'part-{shard:02d}.json' + ('.gz' if packed else '')
        (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


def unmasked(batch):
    """The samples of a batch as they were before they were masked, without padding."""
    tokens = torch.where(batch['labels'] == -100, batch['input_ids'], batch['labels'])
    return [tuple(row[mask == 1].tolist()) for row, mask in zip(tokens, batch['attention_mask'], strict=True)]


class Watch(Callback):
    """Remembers the batches of a run."""

    def __init__(self):
        self.batches = []

    def batch_start(self, state, logger):
        self.batches.append({key: value.clone() for key, value in state.batch.items()})

    @property
    def samples(self):
        return [sample for batch in self.batches for sample in unmasked(batch)]


def tiny_bert(tokenizer, dropout=0.1):
    torch.manual_seed(99)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return HuggingFaceModel(BertForMaskedLM(config), tokenizer=tokenizer, use_logits=True)


def train(spec, max_duration, dropout=0.1, **kwargs):
    """Train a tiny BERT; its weights, and the batches that it saw."""
    model = tiny_bert(spec.dataloader.dataset.tokenizer, dropout)
    watch = Watch()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=max_duration,
        callbacks=[watch],
        seed=3,
        progress_bar=False,
        device='cpu',
        **kwargs,
    )
    trainer.fit()
    trainer.close()
    end_workers(trainer.state)
    return model.state_dict(), watch


def digest(weights):
    """Tells one network's weights from others', to the bit."""
    content = hashlib.sha256()
    for key in sorted(weights):
        content.update(weights[key].numpy().tobytes())
    return content.hexdigest()


def stream(folder, batch_size=4, **options):
    """The training stream of the shards in `folder`, which has a vocabulary too."""
    options = {'max_length': 10, 'shuffle_buffer': 7, 'num_workers': 0, **options}
    return data.c4('train', batch_size, data_dir=folder / 'text', tokenizer=str(folder / 'vocab.txt'), **options)
