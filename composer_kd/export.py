"""A checkpoint of a text model -> a folder that Hugging Face's libraries load."""

import os
import shutil
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from composer_kd.checkpoints import CheckpointError, find_checkpoint
from composer_kd.models.fit import positions_of
from composer_kd.models.pretrained import build_network, names_of_weights, read_pretrained
from composer_kd.tokenization import load_tokenizer

_KINDS = (AutoModelForMaskedLM, AutoModelForSequenceClassification)


def export(checkpoint: str | Path, folder: str | Path) -> str:
    """Write weights (safetensors), config and tokenizer of a checkpoint as `from_pretrained` wants them.

    The folder appears when it is complete.

    Args:
        checkpoint: a Composer checkpoint of a masked language model or text classifier, or the folder of its run.
        folder: the folder to make.

    Returns:
        The class of `transformers.AutoModelFor...` that loads it.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        FileNotFoundError: there is none.
        FileExistsError: the folder is there already.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f'{folder} is there already: choose another folder, or delete it')
    file = find_checkpoint(checkpoint)
    if file is None:
        raise FileNotFoundError(
            f'{checkpoint}: there is no checkpoint, neither a file nor the folder of a run with one'
        )
    trained = read_pretrained(file)
    auto = next((auto for auto in _KINDS if names_of_weights(auto, trained.config) == {*(trained.weights or ())}), None)
    if auto is None:
        raise CheckpointError(f'{file}: its weights are of no {trained.config.model_type} that transformers knows')
    network, tokenizer = build_network(auto, trained.config, trained), load_tokenizer(str(file))
    tokenizer.model_max_length = positions_of(network) or tokenizer.model_max_length  # where truncation=True is to cut
    beside = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    try:
        network.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return auto.__name__
