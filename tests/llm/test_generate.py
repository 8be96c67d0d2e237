"""Cached generation against whole forward passes."""
import numpy as np
import pytest
from tiny_methods import METHODS
from tiny_model import PATCH, VOCAB, apply, random_params, strict  # noqa: F401

from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.llm.generate import greedy

BUDGETS = Budgets(slots=30, patches=12, images=2, patch_dim=PATCH.patch_size**2 * 3)
NEW_TOKENS = 6


def prompts():
    """Prompts of different lengths: a picture inside, at the start, two adjacent ones, none."""
    rng = np.random.default_rng(3)

    def text(size):
        return Text(rng.integers(1, VOCAB, size).tolist())

    def picture(rows, cols):
        pixels = rng.integers(0, 256, (rows * cols, BUDGETS.patch_dim)).astype(np.uint8)
        return Picture(pixels, rows, cols)
    return [[text(2), picture(2, 3), text(4)], [picture(3, 3), text(7)],
            [picture(1, 1), picture(2, 2), text(1)], [text(9)]]


# Low rank; kernels and low rank of vision slots only; gated low rank; routes of a hidden slot, in text as in pictures.
@pytest.mark.parametrize('name', ['vora', 'llavit', 'vora_vision', 'vce_dual_lora', 'lavin'])
def test_generation_equals_whole_forward_passes(name):
    """With adapters on in some rows only; the first row ends early."""
    method, stage = METHODS[name]
    model = method.stage(stage).model

    def rows(segments):
        return stack([layout([segment], BUDGETS, rule=method.vision_tokens) for segment in segments])
    params = random_params(model, rows(prompts()), seed=1, spread=2.0)
    on = np.array([True, True, False, True])
    unembedding = np.asarray(model.unembedding(params))
    answers = [[] for _ in prompts()]
    for _ in range(NEW_TOKENS):
        longer = rows([prompt + [Text(ids)] for prompt, ids in zip(prompts(), answers)])
        hidden = np.asarray(apply(model)(params, longer, on).hidden)
        last = (longer.modality != 0).sum(1) - 1
        logits = hidden[np.arange(len(last)), last] @ unembedding
        for ids, best in zip(answers, logits.argmax(-1)):
            ids.append(int(best))
    assert len({tuple(ids) for ids in answers}) == 4
    end = next(ids for ids in answers[0] if ids != answers[0][0])
    assert any(end not in ids for ids in answers)
    for ids in answers:
        length = ids.index(end) + 1 if end in ids else NEW_TOKENS
        ids[length:] = [0] * (NEW_TOKENS - length)
    generated = greedy(model, params, rows(prompts()), max_new_tokens=NEW_TOKENS, eos_id=end, adapters_on=on)
    assert generated.tolist() == answers
