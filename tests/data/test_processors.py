"""Pixels of the references: transformers' image processors, and the original VoRA."""
import io
import pathlib

import numpy as np
import PIL.Image
import pytest

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import fit_grids, load_pictures

GOLDEN = pathlib.Path(__file__).parent / 'vora_golden'
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 56
CLIP = {'size': {'shortest_edge': SIDE}, 'crop_size': {'height': SIDE, 'width': SIDE}}
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
POLICIES = {
    'clip': ImagePolicy(kind='square_crop', side=SIDE),
    'llava': ImagePolicy(kind='square_pad', side=SIDE, color=tuple(int(value * 255) for value in CLIP_MEAN)),
    'siglip': ImagePolicy(kind='square_stretch', side=SIDE),
    'llava_next': ImagePolicy(kind='tiles', side=SIDE, tiles=NEXT),
}


def processor(name):
    """The variant that computes with Pillow: the other one resizes with torch, which rounds in its own way."""
    models = pytest.importorskip('transformers').models
    try:
        if name == 'clip':
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
            return Processor(**CLIP)
        if name == 'llava':
            from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
            return Processor(**CLIP, do_pad=True)
        if name == 'siglip':
            from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor
            return Processor(size={'height': SIDE, 'width': SIDE}, resample=3)
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Processor
        return Processor(**CLIP, image_grid_pinpoints=[[rows * SIDE, cols * SIDE] for rows, cols in NEXT])
    except ImportError:
        pytest.skip(f'this version of {models.__name__} has no processor for Pillow')


def random_image(rng, shapes):
    mode = rng.choice(['RGB', 'L', 'RGBA', 'LA', 'P', '1', 'CMYK', 'RGB'])
    height, width = (int(2 ** rng.uniform(*shapes)) for _ in range(2))
    rgba = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
    return rgba.convert(mode) if mode != 'LA' else rgba.convert('LA')


def pixels(pictures, patch_size):
    """u8[pictures, height, width, 3]."""
    return np.stack([picture.pixels.reshape(picture.rows, picture.cols, patch_size, patch_size, 3)
                     .transpose(0, 2, 1, 3, 4).reshape(picture.rows * patch_size, -1, 3) for picture in pictures])


@pytest.mark.parametrize('name', POLICIES)
def test_pixels_are_those_of_the_processor(name):
    theirs, policy, rng = processor(name), POLICIES[name], np.random.default_rng(0)
    for number in range(40):
        image = random_image(rng, (0, 8) if name == 'siglip' else (4, 9))
        file = io.BytesIO()
        image.save(file, 'TIFF')
        ours = pixels(load_pictures(file, 14, policy), 14)
        expected = theirs(image, do_normalize=False, do_rescale=False, return_tensors='np')['pixel_values'][0]
        expected = expected.reshape(-1, *expected.shape[-3:]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(ours, expected, f'{number}: {image.mode} {image.size}')
        # and as the model sees them
        normal = theirs(image, return_tensors='np')['pixel_values'][0].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        mean, std = np.array(theirs.image_mean), np.array(theirs.image_std)
        np.testing.assert_allclose((ours / 255 - mean) / std, normal, atol=2e-6)


def test_the_tiles_chosen_are_those_of_the_processor():
    choose = pytest.importorskip('transformers.image_processing_utils').select_best_resolution
    rng = np.random.default_rng(0)
    for _ in range(3000):
        tiles = tuple(map(tuple, rng.integers(1, 5, (int(rng.integers(1, 7)), 2)).tolist()))
        size = tuple(int(2 ** rng.uniform(0, 10)) for _ in range(2))
        policy = ImagePolicy(kind='tiles', side=28, tiles=tiles, max_patches=99)
        best = choose(size, [(rows * 28, cols * 28) for rows, cols in tiles])
        if best:  # None where a side of every choice would be less than a pixel
            assert len(fit_grids(*size, 14, policy)) == 1 + best[0] * best[1] // 28 ** 2, (size, tiles)


@pytest.mark.parametrize('number', range(3))
def test_pixels_of_the_original(number):
    policy = ImagePolicy(kind='square_pad', side=448)
    ours = pixels(load_pictures(GOLDEN / 'frames' / f'{number:08}.png', 14, policy), 14)[0]
    golden = np.asarray(PIL.Image.open(GOLDEN / 'pixels' / f'{number:08}.png'))
    assert golden.shape == (448, 448, 3)
    assert np.abs(ours.astype(int) - golden).max() <= 2
