"""ONNX graphs that hold a DINOv2-shaped ViT, as Hugging Face folders."""
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from vora_jax.convert.samples.onnx_dinov2 import PREPROCESSOR, read_dinov2, tensor_names
from vora_jax.types import UserError

onnx = pytest.importorskip('onnx', reason='needs the extra `assets` (onnx)')

WIDTH, LAYERS, SIDE, PATCH, HEAD_DIM = 32, 2, 5, 4, 16
GRID = 'embeddings.position_embeddings'


def shape_of(name):
    shapes = {'embeddings.cls_token': (1, 1, WIDTH), 'embeddings.mask_token': (1, WIDTH), GRID: (1, 1 + SIDE ** 2, WIDTH),
              'embeddings.patch_embeddings.projection.weight': (WIDTH, 3, PATCH, PATCH),
              'mlp.fc1.weight': (4 * WIDTH, WIDTH), 'mlp.fc1.bias': (4 * WIDTH,), 'mlp.fc2.weight': (WIDTH, 4 * WIDTH)}
    square = name.endswith('.weight') and '.attention.' in name
    default = (WIDTH, WIDTH) if square else (WIDTH,)
    return next((shape for end, shape in shapes.items() if name.endswith(end)), default)


def make_weights():
    rng = np.random.default_rng(0)
    names = tensor_names({'num_hidden_layers': LAYERS})
    weights = {name: rng.standard_normal(shape_of(name)).astype(np.float32) for name in names}
    return weights | {'embeddings.mask_token': np.zeros((1, WIDTH), np.float32)}


def write_graph(path, weights, drop=()):
    """A graph named as PyTorch's exporter names it; it cannot be run."""
    given, nodes = {}, []

    def node(kind, name, *inputs):
        nodes.append(onnx.helper.make_node(kind, list(inputs), [f'{name}_output_0'], name=name))

    for number, (name, array) in enumerate(weights.items()):
        if name == GRID:
            given['onnx::Concat_7'], given['onnx::Reshape_8'] = array[:, :1], array[:, 1:]
            node('Reshape', '/backbone/embeddings/Reshape_1', 'onnx::Reshape_8', 'shape')
            node('Concat', '/backbone/embeddings/Concat_6', 'onnx::Concat_7', 'resized')
            node('Concat', '/backbone/embeddings/Concat', 'tokens', 'patches')
            node('Reshape', '/backbone/embeddings/Reshape', 'tokens', 'shape')
        elif array.ndim == 2 and name != 'embeddings.mask_token':
            given[f'onnx::MatMul_{number}'] = array.T
            node('MatMul', f'/backbone/{name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")}/MatMul',
                 'tokens', f'onnx::MatMul_{number}')
        elif name != 'embeddings.mask_token':
            given[f'backbone.{name}'] = array
    given |= {'decoder.final_conv.bias': np.ones(1, np.float32), 'onnx::MatMul_999': np.ones((2, 2), np.float32)}
    node('MatMul', '/backbone/encoder/layer.0/attention/attention/MatMul_1', 'probabilities', 'values')
    node('MatMul', '/decoder/head/MatMul', 'tokens', 'onnx::MatMul_999')
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in given.items()
                    if name not in drop]
    graph = onnx.helper.make_graph(nodes, 'tiny', [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), path)
    return str(path)


def test_names_and_values(tmp_path):
    weights = make_weights()
    model = read_dinov2(write_graph(tmp_path / 'tiny.onnx', weights), head_dim=HEAD_DIM)
    model.write(tmp_path)
    found = load_file(tmp_path / 'model.safetensors')
    assert set(found) == set(weights)
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weights[name], name)
    config = json.loads((tmp_path / 'config.json').read_text())
    sizes = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'mlp_ratio', 'image_size', 'patch_size')
    assert [config[name] for name in sizes] == [32, 2, 2, 4, 20, 4] and config['dtype'] == 'float32'
    assert json.loads((tmp_path / 'preprocessor_config.json').read_text()) == PREPROCESSOR
    assert model.counts['parameters'] == sum(array.size for array in weights.values())


def test_transformers_computes_what_it_did_before(tmp_path):
    torch = pytest.importorskip('torch', reason='needs the extra `torch`')
    from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

    reference = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=20,
                                         patch_size=4)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path / 'reference')  # under the names of the format, which are not those in memory
    weights = load_file(tmp_path / 'reference/model.safetensors')
    read_dinov2(write_graph(tmp_path / 'tiny.onnx', weights), head_dim=HEAD_DIM).write(tmp_path)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        found, expected = (each(pixels).last_hidden_state for each in (model.eval(), reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(np.zeros((300, 400, 3), np.uint8), return_tensors='np')['pixel_values'].shape == (1, 3, 224, 224)


@pytest.mark.parametrize('drop, message', [
    (('backbone.embeddings.patch_embeddings.projection.weight',), "holds no ViT under 'backbone'"),
    (('onnx::Reshape_8',), 'position table is missing'),
    (('backbone.encoder.layer.1.norm2.bias',), r'tensors are 1 missing \(encoder.layer.1.norm2.bias\)'),
    (('backbone.encoder.layer.0.mlp.fc1.bias',), 'MLP width 0 is no DINOv2'),
])
def test_another_graph_is_refused(tmp_path, drop, message):
    with pytest.raises(UserError, match=f'tiny.onnx.*{message}'):
        read_dinov2(write_graph(tmp_path / 'tiny.onnx', make_weights(), drop), head_dim=HEAD_DIM)


def test_damaged_files(tmp_path):
    file = pathlib.Path(write_graph(tmp_path / 'tiny.onnx', make_weights()))
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b'no graph' * 99):
        file.write_bytes(broken)
        with pytest.raises(UserError, match='tiny.onnx is no complete ONNX file'):
            read_dinov2(str(file))
    file.write_bytes(b'')
    with pytest.raises(UserError, match="holds no ViT under 'backbone'"):
        read_dinov2(str(file))
    with pytest.raises(UserError, match='nowhere.onnx does not exist'):
        read_dinov2(str(tmp_path / 'nowhere.onnx'))
