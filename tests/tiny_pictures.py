"""A picture set of a few kilobytes with a model to match, for tests of whole verbs."""
import json
import pathlib

import PIL.Image

from vora_jax.cli import gin_config
from vora_jax.data.text.tokenizer import train_sentencepiece

COLOURS = ('red', 'green', 'blue', 'black', 'white', 'yellow')
VOCAB_SIZE = 300

CONFIG = """
Train.method = @vora()
Train.stage = 'pretrain'
Train.steps = 1
Train.batch_rows = 2
Train.data = @Data()
Data.sources = [@Source()]
Data.tokenizer = '{folder}/tokenizer'
Data.max_slots = 96
Data.max_patches = 16
Data.max_images = 2
Source.path = '{folder}/test.jsonl'
LanguageModel.vocab_size = 300
LanguageModel.num_layers = 2
LanguageModel.width = 16
LanguageModel.mlp_width = 24
LanguageModel.num_heads = 2
LanguageModel.num_kv_heads = 1
LanguageModel.head_dim = 8
PatchEmbed.patch_size = 8
PatchEmbed.width = 12
PatchEmbed.table_rows = 2
PatchEmbed.table_cols = 2
Vit.num_layers = 2
Vit.mlp_width = 16
Vit.num_heads = 2
vora.rank = 2
vora.num_adapted_layers = 2
"""

TEXT_CONFIG = '\n'.join(
    line for line in CONFIG.replace('@vora()', '@language_model()').splitlines()
    if not line.startswith(('PatchEmbed', 'Vit', 'vora'))
)


def make(folder: pathlib.Path) -> pathlib.Path:
    """Writes `images/` (one colour each, two sizes), `test.jsonl` (kinds colour, yes_no) and `tokenizer/`."""
    (folder / 'images').mkdir()
    rows = []
    for number, colour in enumerate(COLOURS):
        name = f'images/{number}.png'
        PIL.Image.new('RGB', (16, 16 + 8 * (number % 2)), colour).save(folder / name)
        for kind, question, answer in (('colour', 'what color?', colour), ('yes_no', 'is it red?', 'yes')):
            turns = [{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': answer}]
            row = {'id': f'{kind}-{number}', 'frames': [name], 'conversations': turns, 'kind': kind}
            rows.append(json.dumps(row) + '\n')
    (folder / 'test.jsonl').write_text(''.join(rows))
    texts = ['what color?', 'is it red?', 'user', 'assistant', *COLOURS] * 9
    train_sentencepiece(texts, str(folder / 'tokenizer'), VOCAB_SIZE)
    return folder


def config(folder: pathlib.Path, text: str = CONFIG):
    """(Train, resolved text) of a tiny run on the set."""
    return gin_config.load('Train', texts=[text.format(folder=folder)])
