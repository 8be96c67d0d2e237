"""The architecture rules, read from the syntax trees.

Who may import whom, where foreign libraries and the process's surroundings may be touched, how big files get
and what nothing is called. Each rule is a function from the files to sentences about violations; the second
half of this file seeds violations of each kind and expects them to be found.
"""

import ast
import dataclasses
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = 'vora_jax'

# A unit (package, or module at the top) imports from its own row or a row above.
ROWS = (
    ('types', 'method'),
    ('batch', 'ops'),
    ('nn',),
    ('vision', 'llm'),
    ('model', 'distill'),
    ('variants', 'params', 'merge'),
    ('data', 'convert', 'training', 'evaluation', 'bench', 'planning'),
    ('cli',),
)
ROW = {unit: number for number, row in enumerate(ROWS) for unit in row}
# Inside row 6 the neighbours are named, and data/ sees little of what is above.
NEIGHBOURS = {'data': (), 'convert': (), 'training': ('data',), 'evaluation': ('data', 'training'),
              'bench': ('data',), 'planning': ('data', 'training')}
DATA_SEES = ('data', 'batch', 'types', 'method')

HOST_ONLY = ('data', 'batch', 'types', 'method')
DEVICE_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')
TORCH_LIBRARIES = ('torch', 'transformers')
TORCH_BASELINE = pathlib.PurePath(PACKAGE, 'bench', 'torch_attention.py')  # measures torch, and is imported only then
EDGE_NAMES = {'sys': ('argv',), 'os': ('environ', 'environb', 'getenv', 'putenv')}
EDGE_MODULES = ('argparse', 'click')

MAX_LINES, MAX_KERNEL_LINES = 250, 450
FORBIDDEN_FILES = ('util', 'utils', 'helper', 'helpers', 'common', 'misc', 'base')
FORBIDDEN_SUFFIXES = ('Manager', 'Handler', 'Factory', 'Registry')
PAPER_NAMES = ('lavin', 'llavit', 'llava', 'dual_lora', 'vora', 'vce', 'mma', 'infmllm', 'llama_adapter')


@dataclasses.dataclass(frozen=True)
class File:
    """One Python file: its path from the root, and its syntax tree."""

    path: pathlib.PurePath
    text: str
    tree: ast.AST

    @property
    def unit(self) -> str:
        """The package or top module of vora_jax it belongs to; '' outside and for vora_jax/__init__.py."""
        parts = self.path.with_suffix('').parts
        return parts[1] if parts[0] == PACKAGE and parts[1] != '__init__' else ''

    def at(self, node: ast.AST) -> str:
        return f'{self.path}:{node.lineno}'


def read(root: pathlib.Path) -> list[File]:
    paths = [p for top in (PACKAGE, 'launch', 'tests') for p in sorted((root / top).rglob('*.py'))]
    return [
        File(p.relative_to(root), p.read_text(encoding='utf-8'), ast.parse(p.read_text(encoding='utf-8')))
        for p in paths
    ]


@functools.cache
def repository() -> list[File]:
    return read(ROOT)


def imports(file: File) -> list[tuple[ast.AST, str]]:
    """Every imported module with its node; `from a import b` counts as `a.b`, import_module('a') as `a`."""
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = file.path.parts[: len(file.path.parts) - node.level] if node.level else ()
            module = '.'.join([*up, *([node.module] if node.module else [])])
            found += [(node, f'{module}.{alias.name}') for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if called in ('import_module', '__import__') and isinstance(node.args[0].value, str):
                found.append((node, node.args[0].value))
    return found


def own_imports(file: File) -> list[tuple[ast.AST, str]]:
    """The units of vora_jax that a file imports."""
    return [(node, name.split('.')[1]) for node, name in imports(file) if name.startswith(PACKAGE + '.')]


def import_direction(files: list[File]) -> list[str]:
    found, edges = [], {}
    for file in files:
        if file.path.parts[0] != PACKAGE:
            continue
        if file.unit and file.unit not in ROW:
            found.append(f'{file.path}: {file.unit!r} has no row; give it one in tests/test_architecture.py')
            continue
        for node, other in own_imports(file):
            if not file.unit or other not in ROW or other == file.unit:
                continue
            if ROW[other] > ROW[file.unit]:
                found.append(
                    f'{file.at(node)}: {file.unit} (row {ROW[file.unit]}) imports {other} (row {ROW[other]}'
                    '), which is below it'
                )
            elif other in NEIGHBOURS and file.unit in NEIGHBOURS and other not in NEIGHBOURS[file.unit]:
                found.append(
                    f'{file.at(node)}: {file.unit} may not import its neighbour {other}; let cli/ join them'
                )
            elif file.unit == 'data' and other not in DATA_SEES:
                found.append(
                    f'{file.at(node)}: data imports {other}, but may see only {", ".join(DATA_SEES[1:])}'
                )
            if (other, file.unit) in edges:
                found.append(
                    f'{file.at(node)}: {file.unit} and {other} import each other, '
                    f'see {edges[other, file.unit]}'
                )
            edges.setdefault((file.unit, other), file.at(node))
    return found


def foreign_libraries(files: list[File]) -> list[str]:
    found = []
    for file in files:
        standalone = 'torch_model' in file.path.parts
        shipped = '.'.join(file.path.parts[:-1]) + '.'  # its companions, shipped beside it
        for node, name in imports(file):
            top = name.split('.')[0]
            if name.startswith('.'.join(TORCH_BASELINE.with_suffix('').parts)) and node in file.tree.body:
                found.append(f'{file.at(node)}: {TORCH_BASELINE.stem} imports torch; import it in the function that runs it')
            if top in TORCH_LIBRARIES or name.startswith('safetensors.torch'):
                if file.path.parts[0] == PACKAGE and file.unit != 'convert' and file.path != TORCH_BASELINE:
                    found.append(f'{file.at(node)}: {top} belongs in {PACKAGE}/convert/ and tests/ only')
            elif top == 'gin' and file.path != pathlib.PurePath(PACKAGE, 'cli', 'gin_config.py'):
                found.append(f'{file.at(node)}: gin belongs in {PACKAGE}/cli/gin_config.py only')
            elif top in DEVICE_LIBRARIES and file.unit in HOST_ONLY:
                found.append(f'{file.at(node)}: {file.unit} runs on the host and imports no {top}')
            elif standalone and top in (PACKAGE, *DEVICE_LIBRARIES) and not name.startswith(shipped):
                found.append(
                    f'{file.at(node)}: this file is shipped in exports and must stand alone, without {top}'
                )
    return found


def surroundings(files: list[File]) -> list[str]:
    found = []
    for file in files:
        if file.unit in ('', 'cli'):
            continue
        uses = [(node, name) for node, name in imports(file)]
        uses += [(node, ast.unparse(node)) for node in ast.walk(file.tree) if isinstance(node, ast.Attribute)]
        for node, name in uses:
            top, *rest = name.split('.')
            is_edge = top in EDGE_MODULES or (rest and rest[0] in EDGE_NAMES.get(top, ()))
            if is_edge or name.endswith('distributed.initialize'):
                found.append(
                    f'{file.at(node)}: {name} is touched only in cli/ and launch/; pass the value in'
                )
    return sorted(set(found))


def file_sizes(files: list[File]) -> list[str]:
    found = []
    for file in files:
        # A kernel is one piece, and so is a file that an export ships alone.
        is_whole = re.fullmatch(r'.*/ops/.*_(tpu|gpu)\.py|.*/torch_model/.*', file.path.as_posix())
        limit = MAX_KERNEL_LINES if is_whole else MAX_LINES
        lines = len(file.text.splitlines())
        if file.path.parts[0] != 'tests' and lines > limit:
            found.append(f'{file.path}: {lines} lines, the limit is {limit}; split it by jobs')
    return found


def forbidden_names(files: list[File]) -> list[str]:
    found = []
    for file in files:
        vague = [part for part in file.path.with_suffix('').parts if part in FORBIDDEN_FILES]
        found += [f'{file.path}: {part!r} says nothing; name the file for its job' for part in vague]
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(FORBIDDEN_SUFFIXES):
                found.append(f'{file.at(node)}: class {node.name}; name it for what it is, not for a pattern')
    return found


def paper_names(files: list[File]) -> list[str]:
    found = []
    for file in files:
        if file.unit in ('', 'variants', 'convert'):
            continue
        names = [(file.tree, part) for part in file.path.with_suffix('').parts[1:]]
        names += [(node, name) for node in ast.walk(file.tree) for name in identifiers(node)]
        for node, name in names:
            words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name.replace('VoRA', 'Vora')).lower()
            paper = next(
                (p for p in PAPER_NAMES if re.search(rf'(^|[_.]){p}($|[_.])', words.replace(PACKAGE, ''))),
                None,
            )
            if paper:
                where = file.at(node) if hasattr(node, 'lineno') else file.path
                found.append(f'{where}: {name!r} names a paper ({paper}); name it for what it computes')
    return found


def identifiers(node: ast.AST) -> list[str]:
    """The names a syntax node introduces or uses."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [
            getattr(node, 'module', None) or '',
            *(a.name for a in node.names),
            *(a.asname or '' for a in node.names),
        ]
    return [
        value
        for field in ('name', 'id', 'attr', 'arg')
        if isinstance(value := getattr(node, field, None), str)
    ]


RULES = (import_direction, foreign_libraries, surroundings, file_sizes, forbidden_names, paper_names)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule):
    found = rule(repository())
    assert not found, '\n' + '\n'.join(found)


SEEDED = {
    import_direction: [
        ('vora_jax/nn/a.py', 'from vora_jax.model import x', 'nn (row 2) imports model (row 4)'),
        ('vora_jax/nn/a.py', 'from vora_jax import model', 'nn (row 2) imports model'),
        ('vora_jax/nn/a.py', 'from ..model import x', 'nn (row 2) imports model'),
        ('vora_jax/nn/a.py', 'def f():\n    import vora_jax.llm.decoder', 'a.py:2: nn (row 2) imports llm'),
        (
            'vora_jax/data/a.py',
            'from vora_jax.ops import rope',
            'data imports ops, but may see only batch, types, method',
        ),
        (
            'vora_jax/data/a.py',
            'from vora_jax.training import loop',
            'data may not import its neighbour training',
        ),
        (
            'vora_jax/convert/a.py',
            'from vora_jax.training import loop',
            'convert may not import its neighbour training',
        ),
        (
            'vora_jax/bench/a.py',
            'from vora_jax.evaluation import tasks',
            'bench may not import its neighbour evaluation',
        ),
        ('vora_jax/training/a.py', 'import vora_jax.cli.main', 'training (row 6) imports cli (row 7)'),
        ('vora_jax/novel/a.py', '', "'novel' has no row"),
    ],
    foreign_libraries: [
        ('vora_jax/training/a.py', 'import torch.nn', 'torch belongs in'),
        ('vora_jax/evaluation/a.py', 'from transformers import AutoConfig', 'transformers belongs in'),
        ('vora_jax/params.py', 'from safetensors.torch import load_file', 'belongs in vora_jax/convert/'),
        ('vora_jax/bench/sides.py', 'def f():\n    import torch', 'sides.py:2: torch belongs in'),
        ('vora_jax/bench/a.py', 'from vora_jax.bench.torch_attention import x', 'a.py:1: torch_attention imports torch'),
        (
            'vora_jax/cli/export.py',
            "import importlib\nimportlib.import_module('torch')",
            'export.py:2: torch belongs in',
        ),
        ('vora_jax/cli/train.py', 'import gin', 'gin belongs in vora_jax/cli/gin_config.py only'),
        ('tests/test_a.py', 'from gin import config', 'gin belongs in'),
        ('vora_jax/data/a.py', 'import jax.numpy as jnp', 'data runs on the host and imports no jax'),
        ('vora_jax/batch.py', 'from flax import linen', 'batch runs on the host and imports no flax'),
        ('vora_jax/convert/torch_model/a.py', 'from .b import c\nfrom ..d import e', 'a.py:2: this file is shipped'),
        ('vora_jax/convert/torch_model/a.py', 'import vora_jax.types', 'must stand alone'),
    ],
    surroundings: [
        ('vora_jax/training/a.py', 'import sys\nprint(sys.argv)', 'a.py:2: sys.argv is touched only in cli/'),
        ('vora_jax/training/a.py', 'import os\nos.environ["A"] = "b"', 'os.environ is touched'),
        ('vora_jax/training/a.py', 'from os import getenv', 'os.getenv is touched'),
        ('vora_jax/data/a.py', 'import argparse', 'argparse is touched'),
        (
            'vora_jax/training/a.py',
            'import jax\njax.distributed.initialize()',
            'jax.distributed.initialize is touched',
        ),
    ],
    file_sizes: [
        ('vora_jax/nn/a.py', '# line\n' * 251, '251 lines, the limit is 250'),
        ('vora_jax/ops/range_attention_tpu.py', '# line\n' * 451, '451 lines, the limit is 450'),
    ],
    forbidden_names: [
        ('vora_jax/nn/utils.py', '', "'utils' says nothing"),
        ('vora_jax/common/a.py', '', "'common' says nothing"),
        ('tests/helpers.py', '', "'helpers' says nothing"),
        ('vora_jax/nn/a.py', 'class CheckpointManager: pass', 'class CheckpointManager'),
    ],
    paper_names: [
        ('vora_jax/nn/a.py', 'def lavin_adapter(): pass', 'lavin'),
        ('vora_jax/nn/a.py', 'class LLaViTAttention: pass\nclass LlavaHead: pass', 'llava'),
        ('vora_jax/nn/a.py', 'x = 1\nf(use_vora=x)', "a.py:2: 'use_vora' names a paper"),
        ('vora_jax/nn/a.py', 'class VoRALayer: pass', 'VoRALayer'),
        ('vora_jax/nn/a.py', 'from vora_jax.nn.dual_lora import x', 'dual_lora'),
        ('vora_jax/nn/lavin.py', '', 'lavin'),
    ],
}
ALLOWED = [
    (
        'vora_jax/training/a.py',
        'import jax\nimport optax\nfrom vora_jax.data import loader\nfrom vora_jax.model import Output',
    ),
    (
        'vora_jax/evaluation/a.py',
        'from vora_jax.training import checkpoint\nfrom vora_jax.data import tokenizer',
    ),
    ('vora_jax/vision/a.py', '"""As in VoRA and LLaVA."""\nfrom vora_jax.llm import decoder  # vora'),
    ('vora_jax/variants.py', 'def vora(): pass'),
    ('vora_jax/convert/torch_model/modeling.py', 'import torch'),
    ('vora_jax/bench/torch_attention.py', 'import torch'),
    ('vora_jax/bench/sides.py', 'def f():\n    from vora_jax.bench.torch_attention import x'),
    ('vora_jax/cli/gin_config.py', 'import gin, os, sys, argparse\nprint(os.environ, sys.argv)'),
    ('vora_jax/ops/range_attention_gpu.py', '# line\n' * 450),
    ('vora_jax/convert/torch_model/modeling_b.py', '# line\n' * 450),
    ('vora_jax/__init__.py', ''),
    ('launch/run.py', 'import os\nprint(os.environ)'),
    ('tests/test_a.py', 'import torch\nfrom vora_jax import variants\nvariants.vora()\n' + '# line\n' * 300),
]


def tree(root, *files):
    for path, text in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return read(root)


@pytest.mark.parametrize(
    'rule, path, text, message', [(rule, *case) for rule, cases in SEEDED.items() for case in cases]
)
def test_a_seeded_violation_is_found(tmp_path, rule, path, text, message):
    found = rule(tree(tmp_path, *(a for a in ALLOWED if a[0] != path), (path, text)))
    assert any(message in sentence for sentence in found), found


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_what_is_allowed_is_not_found(tmp_path, rule):
    assert rule(tree(tmp_path, *ALLOWED)) == []


def test_two_packages_of_a_row_that_import_each_other_are_found(tmp_path):
    found = import_direction(
        tree(
            tmp_path,
            ('vora_jax/llm/a.py', 'import vora_jax.vision.b'),
            ('vora_jax/vision/b.py', 'from vora_jax.llm import a'),
        )
    )
    assert len(found) == 1 and 'vision and llm import each other' in found[0]
