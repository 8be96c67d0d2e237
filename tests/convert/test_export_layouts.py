"""Each layout of export, as its own library loads it."""
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file
from tiny_layouts import SIDE, adapted, bad_value, clip, dinov2, make
from tiny_methods import METHODS
from tiny_models import TEXTS, VOCAB, make_any, make_tokenizer, prompting, random_params

from vora_jax import variants
from vora_jax.convert.export.exportable import exportable
from vora_jax.convert.export.to_hf import export, read_record
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.files.safetensors_files import open_folder
from vora_jax.convert.from_hf import load
from vora_jax.convert.names.name_map import entries, match_names
from vora_jax.convert.verify.comparison import Question, verify
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.text.templates import find_template, jinja
from vora_jax.data.text.tokenizer import MARKERS, load_tokenizer, train_sentencepiece
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.merge import merge
from vora_jax.params import flatten
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import Projector

EOS = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('layouts')
    make_tokenizer(folder)
    rng = np.random.default_rng(3)
    for number in range(2):
        PIL.Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def written(folder):
    """(name of a model, layout, settings) -> (folder, what `export` told), each written once."""
    made = {}

    def get(name, layout, **settings):
        key = f'{name}-{layout}-{"-".join(map(str, settings.values()))}'
        if key not in made:
            made[key] = write(folder, folder / key, *make(name), layout=layout, **settings)
        return folder / key, made[key]

    return get


def write(folder, to, params, model, rule, **settings):
    tokenizer = str(folder / 'tokenizer')
    settings = {'template': jinja(find_template('chatml'), load_tokenizer(tokenizer)), **settings}
    policy = settings.pop('prompting', prompting(tokenizer, image_kind='square_crop', side=SIDE))
    return export(params, model, policy, str(to), rule=rule, **settings)


def compared(folder, name, to, sees=True, **settings):
    """What `verify` finds, on two prompts, one with pictures."""
    params, model, rule = make(name)
    tokenizer, batches = str(folder / 'tokenizer'), []
    pictures = (str(folder / '0.png'), str(folder / '1.png')) if sees else ()
    questions = [Question('is it red?'), Question('<image> and <image>same?' if sees else 'how\nmany?', pictures)]
    if hasattr(model, 'llm'):
        data = Data((Source('none'),), tokenizer, image=ImagePolicy(24, kind='square_crop', side=SIDE))
        prompts = [Prompt(question.text, question.images) for question in questions]
        batches = PromptRows(prompts, data, rule, load_tokenizer(tokenizer)).batches(2)
    return verify(params, model, str(to), questions, batches, eos_id=EOS, rule=rule, max_new_tokens=4, tolerance=1e-4,
                  prompting=prompting(tokenizer, image_kind='square_crop', side=SIDE), **settings)


def again(to):
    """{path: array}: the folder as `vora import` reads it."""
    config = json.loads((to / 'config.json').read_text())
    picture = json.loads(file.read_text()) if (file := to / 'preprocessor_config.json').is_file() else None
    with open_folder(to) as there:
        given = {name: info.shape for name, info in there.tensors.items()}
        known = recognise(config, given, picture, teacher_heads=2)
        model = getattr(variants, known.method)(**known.arguments).stage(known.stage).model
        shapes = jax.eval_shape(lambda: random_params(model))
        sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ('x',)), jax.sharding.PartitionSpec())
        targets = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                   for path, leaf in flatten(shapes).items()}
        pieces = entries({path: leaf.shape for path, leaf in targets.items()}, known.table)
        names, _ = match_names(pieces, given, known.table, str(to))
        return load(there, pieces, names, targets)


@pytest.mark.parametrize(('name', 'layout'), [
    ('adapted', 'vora'), ('adapted', 'llm'), ('adapted', 'peft'), ('merged_biased', 'llm'), ('vision', 'llm'),
    ('clip', 'llava'), ('siglip', 'llava'), ('qwen3', 'llm'), ('encoder_clip', 'encoder'), ('encoder_siglip', 'encoder'),
    ('encoder_aimv2', 'encoder'), ('encoder_dinov2', 'encoder'), ('tagger', 'encoder'),
    # A layout and a kind of adapter, of which each is above.
    pytest.param('biased', 'vora', marks=pytest.mark.slow), pytest.param('clip_lora', 'llava', marks=pytest.mark.slow)])
def test_verify_finds_nothing(name, layout, folder, written):
    """transformers (or peft) loads it with no key missing or left over; logits and greedy tokens are ours."""
    if layout != 'vora':
        pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    if layout == 'peft':
        pytest.importorskip('peft', reason='needs pip install peft')
    to, done = written(name, layout)
    found = compared(folder, name, to, name != 'qwen3' and layout != 'llm')
    assert (found.problems, found.layout, found.dtype) == ([], layout, 'float32')
    assert found.tensors == done.num_tensors > 20
    if layout == 'encoder':
        assert found.max_abs_feature_diff < 1e-5  # measured 2e-6
    else:
        assert found.num_prompts == 2 == found.same_answers + found.near_ties
        assert found.max_abs_logit_diff < 5e-5  # measured 2e-5 at logits up to 20
    card = (to / 'README.md').read_text()
    assert f'in the layout `{layout}`' in card and all(note in card for note in done.notes)


@pytest.mark.parametrize(('name', 'layout'), [
    ('biased', 'vora'), ('clip', 'llava'), ('siglip', 'llava'), ('llama', 'llm'), ('qwen3', 'llm'),
    ('encoder_clip', 'encoder'), ('encoder_siglip', 'encoder'), ('encoder_aimv2', 'encoder'), ('encoder_dinov2', 'encoder')])
def test_imported_again_it_is_the_same(name, layout, written):
    to, _ = written(name, layout)
    ours, theirs = flatten(make(name)[0]), again(to)
    for path, leaf in ours.items():
        if path.endswith('adapter_0/b'):
            leaf = np.asarray(leaf) * 0.5  # the scale
        other = np.asarray(theirs.pop(path))
        if path in ('decoder/embedding', 'decoder/lm_head'):  # rows for <image>
            other = other[tuple(slice(size) for size in leaf.shape)]
        np.testing.assert_array_equal(other, leaf, path)
    assert not theirs


@pytest.mark.parametrize('name', ['clip', 'tied'])
def test_the_id_of_a_picture_never_wins(name, folder, tmp_path):
    """A tokenizer without <image> gets it behind all others, where the embedding has no row."""
    torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    import transformers
    train_sentencepiece(TEXTS, str(tmp_path / 'tokenizer'), VOCAB, MARKERS[:2])
    params, model, rule = make(name)
    to, policy = tmp_path / 'out', prompting(str(tmp_path / 'tokenizer'), image_kind='square_crop', side=SIDE)
    done = write(folder, to, params, model, rule, layout='llava', prompting=policy)
    config, generation = (json.loads((to / f'{file}.json').read_text()) for file in ('config', 'generation_config'))
    new, all_ids = config['image_token_index'], config['text_config']['vocab_size']
    assert new >= VOCAB and all_ids == 320 and generation['suppress_tokens'] == list(range(VOCAB, 320))
    assert any('the mean of all logits' in note for note in done.notes)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(to).eval()
    head = np.asarray(model.unembedding(params)).T
    np.testing.assert_array_equal(loaded.lm_head.weight[:VOCAB].detach().numpy(), head)
    with torch.no_grad():
        logits = loaded.lm_head(torch.randn(500, head.shape[1]))
    assert (logits[:, VOCAB:].amax(1) < logits[:, :VOCAB].amax(1)).all()
    question = [Question('what?', (str(folder / '0.png'),))]
    data = Data((Source('none'),), policy.tokenizer, image=ImagePolicy(24, kind='square_crop', side=SIDE))
    batches = PromptRows([Prompt(*question[0][:2])], data, rule, load_tokenizer(policy.tokenizer)).batches(1)
    found = verify(params, model, str(to), question, batches, eos_id=policy.eos_id, rule=rule, prompting=policy,
                   max_new_tokens=3, tolerance=1e-4)
    assert found.problems == [] and found.num_prompts == 1


def test_adapters_beside_a_base_of_another_place(folder, tmp_path):
    params, model, rule = make('some')
    done = write(folder, tmp_path / 'out', params, model, rule, layout='peft', base='someone/base-7b')
    assert not (tmp_path / 'out' / 'base').exists() and 'cannot see' in done.notes[0]
    config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'someone/base-7b' and config['target_modules'] == ['q_proj', 'k_proj']
    assert (config['r'], config['lora_alpha'], config['layers_to_transform']) == (3, 1.5, [0, 1])
    tensors = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
    assert tensors['base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight'].shape == (3, 24)
    assert len(tensors) == 8
    assert compared(folder, 'some', tmp_path / 'out').left_out == ['logits were not compared, because the base is someone/'
                                                                   'base-7b']


def test_merging_on_export_is_what_merge_does(folder, written):
    params, model, _ = make('adapted')
    to, done = written('adapted', 'own', merge=True)
    merged = exportable(*merge(params, model))
    assert done.merged and done.report.num_folded == 14 and read_record(to)['merged']
    tensors = load_file(to / 'model.safetensors')
    np.testing.assert_array_equal(tensors['model.layers.1.mlp.up_proj.weight'],
                                  np.asarray(merged.params['decoder/layers/group_0/block/up_proj/kernel'][1]).T)
    assert not [name for name in tensors if 'lora' in name]
    assert done.report.change > done.report.lost > 0 and done.report.dtype == 'bfloat16'  # what a later cast would lose
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    assert compared(folder, 'adapted', to).problems == []


def test_kernels_of_one_modality_are_merged_on_export(folder, written):
    """What acts on vision slots becomes a kernel of theirs; bit for bit what `merge` makes."""
    params, model, _ = make('vision')
    to, done = written('vision', 'own', merge=True)
    merged = exportable(*merge(params, model))
    assert done.merged and done.report.num_folded == 14
    tensors = load_file(to / 'model.safetensors')
    base = 'decoder/layers/group_0/block/up_proj/'
    for name, path in (('weight', 'kernel'), ('modality_proj.0.weight', 'adapter_0/kernel')):
        kernel = np.asarray(merged.params[base + path][1]).T
        np.testing.assert_array_equal(tensors[f'model.layers.1.mlp.up_proj.{name}'], kernel)
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    assert compared(folder, 'vision', to).problems == []
    back = again(to)
    for path, leaf in merged.params.items():
        np.testing.assert_array_equal(back[path], leaf, path)


def test_the_widest_dtype_is_kept(folder, tmp_path):
    params, model, rule = make('llama')
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert write(folder, tmp_path / 'a', half, model, rule).dtype == 'bfloat16'
    half['decoder']['norm'] = params['decoder']['norm']
    assert write(folder, tmp_path / 'b', half, model, rule).dtype == 'float32'
    done = write(folder, tmp_path / 'c', params, model, rule, dtype='float16')
    assert done.dtype == 'float16' and 0 < done.report.lost < 1e-3 and done.report.num_folded == 0
    assert load_file(tmp_path / 'c' / 'model.safetensors')['lm_head.weight'].dtype == np.float16


@pytest.mark.parametrize(('name', 'layout', 'settings', 'message'), [
    ('adapted', 'llava', {}, 'needs a vision encoder and a projector; take `vora` or `own`'),
    ('llama', 'vora', {}, 'reads patches without an encoder; take `llm`'),
    ('clip', 'vora', {}, 'reads patches without an encoder; take `llava` or `own`'),
    ('text', 'llm', {}, "scope 'text' cannot be folded into a kernel that other slots share; train with"),
    ('llavit', 'llava', {}, "stock LLaVA has no kernels of their own for a picture's slots"),
    ('llavit', 'own', {'merge': True}, 'has no adapters to merge; leave out --merge'),
    ('lavin', 'llava', {}, 'a ModalityMixture weighs its paths by the modality'),
    ('lavin', 'llm', {}, 'so no kernel equals it; export the model unmerged (layout `own`).'),
    ('lavin', 'peft', {}, 'no mixtures routed by modality'),
    ('vce_dual_lora', 'llava', {}, 'so no kernel equals it; export the model unmerged (layout `own`).'),
    ('dual_on_llava', 'peft', {}, 'PEFT has no DualLowRank; take the layout `own`'),
    ('prompted', 'own', {'merge': True}, 'GatedPrompts are keys and values beside the kernels'),
    ('kernels_on_patches', 'vora', {}, "VoRA's code has only a patch embedding with bias, norm"),
    ('vision', 'vora', {'merge': True}, "adapter of scope 'all' on each of the seven linears; take the layout `own`."),
    ('vision', 'peft', {}, "PEFT's adapters act on all slots, these on those of scope 'vision'; take the layout `own`"),
    ('some', 'vora', {}, "one LowRank adapter of scope 'all' on each of the seven linears"),
    ('merged', 'peft', {}, 'there are no adapters to write as a PEFT folder'),
    ('adapted', 'peft', {'merge': True}, 'holds adapters as they are; leave out --merge'),
    ('merged', 'own', {'merge': True}, 'has no adapters to merge; leave out --merge'),
    ('biased', 'peft', {'base': 'a/b'}, 'trained with biases that its base does not have'),
    ('llama', 'llm', {'base': 'a/b'}, 'the layout `llm` names no base model; leave out --base'),
    ('llama', 'encoder', {}, 'the layout `encoder` is for vision encoders'),
    ('encoder_clip', 'own', {}, 'a ImageEncoder does not generate text, so it has no layout `own`; take `encoder`'),
    ('llama', 'onnx', {}, "there is no layout 'onnx'; choose one of own, vora, llava"),
])
def test_what_a_layout_cannot_hold_is_told(name, layout, settings, message, folder):
    made = make_any(name) if name in METHODS or name in ('text', 'prompted') else make(name)
    with pytest.raises(UserError) as told:
        write(folder, folder / 'no', *made, layout=layout, **settings)
    assert message in str(told.value)
    assert not (folder / 'no').exists() and not list(folder.glob('.no*'))


def test_llava_of_other_kinds_is_told(folder):
    llm = make('clip')[1].llm
    for method, message in ((variants.llava(llm, dinov2(), Projector()), 'around CLIP or SigLIP, not dinov2'),
                            (variants.llava(llm, clip(), Projector(3)), 'has 2 layers, this one 3')):
        model = method.stage('finetune').model
        with pytest.raises(UserError, match=message):
            write(folder, folder / 'no', random_params(model), model, method.vision_tokens, layout='llava')
    params, model, rule = make('clip')
    with pytest.raises(UserError, match='slots see all of it, in LLaVA they are causal'):
        write(folder, folder / 'no', params, model, dataclasses.replace(rule, bidirectional=True), layout='llava')


def test_what_vora_computes_in_another_way_is_told(folder, tmp_path):
    method = adapted(scale=0.3)
    model = method.stage('pretrain').model
    done = write(folder, tmp_path / 'out', random_params(model), model, method.vision_tokens, layout='vora',
                 prompting=prompting(str(folder / 'tokenizer')), base='Qwen/Qwen2.5-7B-Instruct')
    told = ' '.join(done.notes)
    for phrase in ('not shipped here', 'scale 0.3 is multiplied', 'a bias; they are zero', 'first rows of the table',
                   'lets them see each other', f'a square of {SIDE} x {SIDE} pixels', "of the kind 'native'",
                   'distillation heads'):
        assert phrase in told, phrase
    config, picture = (json.loads((tmp_path / 'out' / f'{name}.json').read_text())
                       for name in ('config', 'preprocessor_config'))
    assert config['llm'] == 'Qwen/Qwen2.5-7B-Instruct' and config['aux_vision'] == ''
    assert config['lora']['r'] == 3 and config['lora']['layers'] == 2
    assert picture['size'] == {'shortest_edge': SIDE} and picture['crop_size'] == {'height': SIDE, 'width': SIDE}
    merged = write(folder, tmp_path / 'merged', *make('merged'), layout='vora')
    assert json.loads((tmp_path / 'merged' / 'config.json').read_text())['lora'] == {} and not merged.merged
    biased = write(folder, tmp_path / 'biased', *make('biased'), layout='vora', merge=True)
    assert json.loads((tmp_path / 'biased' / 'config.json').read_text())['lora']['r'] == -1 and biased.merged


def test_weights_that_are_not_finite(folder):
    params, model, rule = make('llama')
    with pytest.raises(UserError, match='hold NaN or infinity as float32: model.norm.weight; take an earlier step'):
        write(folder, folder / 'no', bad_value(params), model, rule)
    with pytest.raises(UserError, match='as float16: model.norm.weight'):
        write(folder, folder / 'no', bad_value(params, 1e30), model, rule, dtype='float16')
    assert not (folder / 'no').exists() and not list(folder.glob('.no*'))


def test_a_full_disk(folder, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.pwrite', full)
    with pytest.raises(UserError, match='No space left on device.*free some space'):
        write(folder, folder / 'no', *make('llama'))
    assert not (folder / 'no').exists() and not list(folder.glob('.no*'))


def test_distillation_losses(folder, written):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    params, model, rule = make('adapted')
    teacher = folder / 'teacher'
    stage = variants.image_encoder(model.distillation.teacher).stage('frozen')
    write(folder, teacher, {'encoder': params['teacher']}, stage.model, rule, layout='encoder')
    to, _ = written('adapted', 'own')
    found = compared(folder, 'adapted', to, teacher=str(teacher))
    assert found.problems == [] and [layer for layer, *_ in found.distill_losses] == [0, 1]
    for _, ours, theirs in found.distill_losses:
        assert abs(ours - theirs) < 1e-5 and ours > 0.1
    write(folder, folder / 'other', *make('encoder_clip'), layout='encoder')
    with pytest.raises(UserError, match='give the folder of the encoder that it distils from'):
        compared(folder, 'adapted', to, teacher=str(folder / 'other'))


def test_a_file_of_an_export_that_is_gone(folder, written, tmp_path):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    for layout, files, told in (('vora', ['preprocessor_config.json'], 'preprocessor_config.json cannot be read'),
                                ('own', ['tokenizer.json', 'tokenizer_config.json', 'tokenizer.model'], 'does not load')):
        to = tmp_path / layout
        shutil.copytree(written('adapted', layout)[0], to)
        for name in files:
            (to / name).unlink(missing_ok=True)
        with pytest.raises(UserError, match=told):
            compared(folder, 'adapted', to)


def test_nothing_of_a_stock_layout_needs_our_code(written):
    for name, layout in (('clip', 'llava'), ('llama', 'llm'), ('encoder_clip', 'encoder'), ('merged_biased', 'vora')):
        to, _ = written(name, layout)
        assert not list(pathlib.Path(to).glob('*.py'))
