"""What packing must not change: the loss of each token."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_run
from generated_set import made_up_rows, write_pictures, write_rows, write_tokenizer

from vora_jax import variants
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.vision.encoder_frontend import Projector
from vora_jax.vision.vit import Vit

CLS = dataclasses.replace(tiny_run.EMBED, cls_token=True)
ENCODER = Vit(CLS, num_layers=2, mlp_width=16, num_heads=2, norm='layer', activation='gelu_quick')
METHODS = {  # a picture's slots see all of it; an encoder with a [cls] place whose patches see their own picture
    'bidirectional': (variants.vora(tiny_run.LLM, tiny_run.EMBED, tiny_run.VIT, 2, num_adapted_layers=2), 'pretrain'),
    'encoder': (variants.llava(tiny_run.LLM, ENCODER, Projector()), 'finetune'),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    names = write_pictures(folder / 'images', 20, 22)
    rows = made_up_rows(40, names, (1, 0, 2, 1, 0, 3), words=6)
    return Data((Source(write_rows(folder / 'rows.jsonl', rows), str(folder / 'images')),), write_tokenizer(folder),
                max_slots=320, max_patches=120, max_images=12, image=ImagePolicy(max_patches=25))


def losses_of_samples(data, method, stage):
    """({tokens of a sample: f32[its supervised slots]}, largest number of samples in a row), of one epoch."""
    model = method.stage(stage).model.clone(deterministic=True)
    loader = batches(data, method.vision_tokens, 4, seed=0)
    rows = [next(loader) for _ in range(-(-loader.num_rows // 4))]
    loader.close()
    params = tiny_model.random_params(model, rows[0])

    @tiny_model.quick_jit
    def losses(params, batch):
        hidden = model.apply({'params': params}, batch).hidden.astype(jnp.float32)
        logits = jnp.einsum('bsd,dv->bsv', hidden, model.unembedding(params), precision='highest')
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]

    found, most = {}, 0
    for batch in rows:
        values = np.asarray(losses(params, batch))
        most = max(most, int(batch.segment_id.max()))
        for row in range(4):
            for number in range(1, batch.segment_id[row].max() + 1):
                here = batch.segment_id[row] == number
                found[batch.tokens[row, here].tobytes()] = values[row, here & (batch.loss_mask[row] > 0)]
    return found, most


@pytest.mark.parametrize('name', METHODS)
def test_losses_of_tokens_do_not_depend_on_packing(data, name):
    packed, most = losses_of_samples(data, *METHODS[name])
    alone, one = losses_of_samples(dataclasses.replace(data, pack=False), *METHODS[name])
    assert most >= 3 and one == 1 and len(alone) == 40
    assert packed.keys() == alone.keys()
    wrong = max(float(np.abs(packed[sample] - alone[sample]).max()) for sample in alone)
    spread = np.std(np.concatenate(list(alone.values())))
    print(f'{name}: {sum(map(len, alone.values()))} tokens, losses differ by {wrong:.1e}, their spread is {spread:.2f}')
    assert wrong < 1e-5 and spread > 0.3
