"""A model as a PyTorch / Hugging Face folder."""
import dataclasses
import json
import math
import pathlib
import shutil

import jax.numpy as jnp

from vora_jax.convert.exportable import Exportable, exportable
from vora_jax.convert.name_map import entries, to_foreign
from vora_jax.convert.new_folder import new_folder
from vora_jax.convert.safetensors_files import write_shards
from vora_jax.convert.sentencepiece_json import write_tokenizer
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params, UserError

MODULE = 'modeling_vora_jax'
MODEL_TYPE = 'vora_jax'
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How prompts are made of questions and pictures; plain values, so that the exported folder can hold them.

    tokenizer: folder of the tokenizer.    eos_id: id that ends an answer.
    system: system message of conversations that bring none; '' for none.
    min_patches, max_patches: limits of one picture's patches.
    """

    tokenizer: str
    eos_id: int
    system: str = ''
    min_patches: int = 1
    max_patches: int = 1024


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote: counts, and phrases for what it left out."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    dropped: tuple[str, ...]


def export(params: Params, model: VisionLanguageModel, prompting: Prompting, folder: str, *,
           dtype: str = 'float32', overwrite: bool = False, max_shard_bytes: int = 4 << 30) -> Exported:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads.

    Adapters that are not merged stay adapters; distillation heads and teacher are left out. The folder appears when
    it is complete.

    Args:
        params: nested parameters.    model: the module they belong to.
        prompting: tokenizer and prompt rules.
        folder: to be made.
        dtype: of the weights, float32, bfloat16 or float16.
        overwrite: replaces an earlier export; never another folder.
        max_shard_bytes: files grow to about this size.

    Raises:
        UserError: the folder exists, the parameters are not the model's, or the tokenizer has no Hugging Face form.
    """
    if dtype not in DTYPES:
        raise UserError(f'export: dtype {dtype!r} is unknown; choose one of {", ".join(DTYPES)}.')
    what = exportable(params, model)
    with new_folder(folder, overwrite, is_export) as partial:
        image_token_id = write_tokenizer(prompting.tokenizer, partial, prompting.eos_id, prompting.system)
        _write_weights(what, dtype, partial, max_shard_bytes)
        _write_json(partial / 'config.json', config_json(what.model, prompting, image_token_id, dtype))
        ends = {'eos_token_id': prompting.eos_id, 'pad_token_id': prompting.eos_id}
        _write_json(partial / 'generation_config.json', {'do_sample': False, **ends})
        shutil.copyfile(pathlib.Path(__file__).parent / 'torch_model' / f'{MODULE}.py', partial / f'{MODULE}.py')
        (partial / 'README.md').write_text(_model_card(what.model), encoding='utf-8')
    sizes = [math.prod(entry.shape) for entry in entries(what.shapes)]
    return Exported(len(sizes), sum(sizes), sum(sizes) * jnp.dtype(dtype).itemsize, what.dropped)


def config_json(model: VisionLanguageModel, prompting: Prompting, image_token_id: int, dtype: str) -> dict:
    """The content of config.json; sizes under Qwen2's names."""
    llm, vision = model.llm, None
    if model.vision is not None:
        vision = dataclasses.asdict(model.vision.patch_embed)
        vision |= {'min_patches': prompting.min_patches, 'max_patches': prompting.max_patches}
    adapters = [{'num_layers': group.num_layers, 'linears': {
        linear: [{'rank': adapter.rank, 'scale': adapter.scale, 'scope': adapter.scope} for adapter in table]
        for linear, table in group.adapters}} for group in model.groups]
    return {
        'model_type': MODEL_TYPE, 'architectures': ['VoraJaxForCausalLM'],
        'auto_map': {'AutoConfig': f'{MODULE}.VoraJaxConfig', 'AutoModelForCausalLM': f'{MODULE}.VoraJaxForCausalLM'},
        'vocab_size': llm.vocab_size, 'hidden_size': llm.width, 'intermediate_size': llm.mlp_width,
        'num_hidden_layers': llm.num_layers, 'num_attention_heads': llm.num_heads,
        'num_key_value_heads': llm.num_kv_heads, 'head_dim': llm.head_dim, 'hidden_act': 'silu',
        'rope_parameters': {'rope_type': 'default', 'rope_theta': llm.rope_theta}, 'rms_norm_eps': llm.norm_eps,
        'attention_bias': 'q_proj' in llm.biases, 'tie_word_embeddings': llm.tied_head,
        'adapters': adapters if any(group['linears'] for group in adapters) else [], 'vision': vision,
        'image_token_id': image_token_id, 'eos_token_id': prompting.eos_id, 'pad_token_id': prompting.eos_id,
        'dtype': dtype,
    }


def _write_weights(what: Exportable, dtype: str, folder: pathlib.Path, max_shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and their index; one tensor is in memory at a time."""
    infos = [(entry.name, jnp.dtype(dtype), entry.shape) for entry in entries(what.shapes)]
    write_shards(folder, to_foreign(what.params, what.shapes, dtype), infos, max_shard_bytes)


def is_export(folder: pathlib.Path) -> bool:
    """True where the folder's config.json is one that `export` writes."""
    try:
        return json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_type') == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def _write_json(file: pathlib.Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _model_card(model: VisionLanguageModel) -> str:
    sees = model.vision is not None
    image = "Image.open('picture.png')" if sees else 'None'
    imports = 'from PIL import Image\n' if sees else ''
    kind = 'vision-language' if sees else 'language'
    return f"""---
library_name: transformers
pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}
---
A {kind} model trained with vora_jax: {model.llm.num_layers} layers of width {model.llm.width}.

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained('.', trust_remote_code=True)
print(model.answer(tokenizer, {image}, 'your question'))

# many at once
inputs = model.prepare_inputs(tokenizer, ['a question', 'another'], [{image}] * 2)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True))
```

The model code is `{MODULE}.py` in this folder; it needs torch, transformers 5 and Pillow, and nothing of vora_jax.
"""
