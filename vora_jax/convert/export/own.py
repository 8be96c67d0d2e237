"""The layout of our own modeling files."""
from vora_jax.convert.export.llm import generation
from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.families.own_layout import own_config
from vora_jax.convert.families.own_names import OWN
from vora_jax.method import VisionTokenRule
from vora_jax.vision.patch_frontend import PatchFrontend

USAGE = """\
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('{folder}', trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained('{folder}', trust_remote_code=True)
print(model.answer(tokenizer, {image}, 'your question'))

# many at once
inputs = model.prepare_inputs(tokenizer, ['a question', 'another'], [{image}] * 2)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True))
"""
CODE = ('The model code is `modeling_vora_jax.py` and its neighbours in this folder; it needs torch, transformers (4.50 or '
        'newer) and Pillow, and nothing of vora_jax.')
FIRST_ROW = ('Trained with route_by = \'first_row\', which reads the first example of each batch: this code routes each '
             'prompt by itself, as if it were alone in its batch.')


def plan(request: Request) -> Plan:
    """Every method, merged or not, with the code that runs it."""
    what, rule = request.what, request.rule
    if rule is None and isinstance(what.model.vision, PatchFrontend):
        rule = VisionTokenRule(what.model.vision.patch_embed.patch_size)
    config = own_config(what.model, rule, request.prompting) | {'image_token_id': request.image_token_id}
    if what.model.route_token:  # no id of its own: the first slot of a row holds no picture in any case
        config['route_token_id'] = request.image_token_id
    config |= request.token_ids | {'dtype': request.dtype}
    sees = what.model.vision is not None
    usage = USAGE.format(folder='.', image="Image.open('picture.png')" if sees else 'None',
                         imports='from PIL import Image\n' if sees else '')
    files = {'config.json': config, 'generation_config.json': generation(request)}
    part = Part(OWN, what.params, what.shapes, files, ships_code=True)
    tables = [group.mixtures for group in what.model.groups] + [getattr(what.model.vision, 'mixtures', ())]
    quirk = any(mixture.route_by == 'first_row' for table in tables for _, mixture in table)
    return Plan({'': part}, what.model, usage, (CODE, FIRST_ROW) if quirk else (CODE,))
