"""gin files and flags: wiring, types, scopes, and every mistake in one sentence."""

import dataclasses
import subprocess
import sys
from typing import Literal

import pytest

from vora_jax.cli.gin_config import load, split_arguments
from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    width: int = 64
    rope_theta: float = 1e4
    dtype: str = 'float32'
    tied_head: bool = False


@dataclasses.dataclass(frozen=True)
class Vit:
    width: int = 32
    taps: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...]
    budgets: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    schedule: Literal['constant', 'cosine'] = 'constant'
    clip_norm: float | None = None
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError('learning_rate must not be negative')


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    parts: tuple


@dataclasses.dataclass(frozen=True)
class Train:
    method: Method
    data: Data | None = None
    optimizer: Optimizer = Optimizer()
    final_optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    steps: int = 10
    stage: str = 'pretrain'


@dataclasses.dataclass(frozen=True)
class Eval:
    limit: int = 5


def vora(
    language_model: LanguageModel,
    teacher: Vit | None = None,
    rank: int = 8,
    scope: Literal['all', 'vision'] = 'all',
) -> Method:
    return Method('vora', (language_model, teacher, rank, scope))


def text_only(language_model: LanguageModel = LanguageModel()) -> Method:
    return Method('text_only', (language_model,))


NAMES = {f.__name__: f for f in (LanguageModel, Vit, Source, Data, Optimizer, Train, Eval, vora, text_only)}
METHOD = 'Train.method=@vora()'


def train(*bindings, files=(), texts=()):
    return load('Train', [str(f) for f in files], bindings, texts, NAMES)


def message(*bindings, **kwargs):
    with pytest.raises(UserError) as caught:
        train(*bindings, **kwargs)
    text = str(caught.value)
    assert text[-1] in '.?' and '\n' not in text
    return text


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestBuilding:
    def test_every_dataclass_parameter_is_wired_without_a_file(self):
        config, _ = train(METHOD, 'LanguageModel.width=128', 'Optimizer.learning_rate=0.5')
        assert config.method.parts[0].width == 128
        assert config.optimizer.learning_rate == 0.5
        assert type(config) is Train

    def test_the_plain_classes_stay_free_of_gin(self):
        train(METHOD, 'LanguageModel.width=128')
        assert LanguageModel().width == 64

    def test_a_load_leaves_nothing_behind(self):
        train(METHOD, 'LanguageModel.width=128')
        assert train(METHOD)[0].method.parts[0].width == 64

    def test_optional_parts_and_special_defaults_are_named_by_the_user(self):
        assert train(METHOD)[0].method.parts[1] is None
        assert train(METHOD)[0].final_optimizer == Optimizer(learning_rate=1e-5)
        config, _ = train(
            METHOD,
            'vora.teacher=@Vit()',
            'Vit.width=8',
            'Train.final_optimizer=@final/Optimizer()',
            'final/Optimizer.clip_norm=1',
        )
        assert config.method.parts[1] == Vit(width=8)
        assert config.final_optimizer == Optimizer(clip_norm=1.0)

    def test_scoped_references_in_a_list(self):
        config, _ = train(
            METHOD,
            'Train.data=@Data()',
            'Data.sources=[@colour/Source(), @shape/Source()]',
            'Source.weight=2',
            'colour/Source.path=a.jsonl',
            'shape/Source.path=b.jsonl',
            'shape/Source.weight=3',
        )
        assert config.data.sources == (Source('a.jsonl', 2.0), Source('b.jsonl', 3.0))

    def test_a_scope_reaches_what_is_built_inside_it(self):
        config, _ = train('Train.method=@small/vora()', 'small/LanguageModel.width=4')
        assert config.method.parts[0].width == 4

    def test_blocks_macros_and_values(self, tmp_path):
        path = write(
            tmp_path,
            'a.gin',
            """
            WIDTH = 16
            Train.method = @vora()
            vora:
                teacher = @Vit()
                scope = 'vision'
            LanguageModel.width = %WIDTH
            Vit.width = %WIDTH
            Vit.taps = [3,
                        4]  # two
            Optimizer.lr_multipliers = [('*/scale', 0), ['b', 2.5]]
        """.replace('\n            ', '\n'),
        )
        config, _ = train(files=[path])
        assert config.method.parts[:2] == (LanguageModel(width=16), Vit(16, (3, 4)))
        assert config.optimizer.lr_multipliers == (('*/scale', 0.0), ('b', 2.5))

    def test_barewords_on_the_command_line(self):
        config, _ = train(METHOD, 'Train.stage=finetune', 'LanguageModel.dtype=bfloat16', 'vora.scope=vision')
        assert (config.stage, config.method.parts[0].dtype, config.method.parts[3]) == (
            'finetune',
            'bfloat16',
            'vision',
        )
        assert train(METHOD, 'Train.stage=/some/path with spaces')[0].stage == '/some/path with spaces'

    def test_integers_become_floats_where_floats_are_wanted(self):
        rate = train(METHOD, 'Optimizer.learning_rate=1')[0].optimizer.learning_rate
        assert type(rate) is float and rate == 1.0


class TestLevels:
    def test_flags_override_files_and_files_override_their_includes(self, tmp_path):
        write(tmp_path, 'shared/model.gin', "LanguageModel.width = 1\nTrain.steps = 1\nTrain.stage = 'a'\n")
        path = write(
            tmp_path,
            'runs/x.gin',
            f"Train.steps = 2\ninclude '../shared/model.gin'\n{METHOD}\nTrain.stage='b'\n",
        )
        config, _ = train('Train.stage=c', files=[path])
        assert (config.method.parts[0].width, config.steps, config.stage) == (1, 2, 'c')

    def test_a_file_included_twice_does_not_undo_an_override(self, tmp_path):
        write(tmp_path, 'base.gin', f'Train.steps = 1\n{METHOD}\n')
        write(tmp_path, 'b.gin', "include 'base.gin'\nTrain.steps = 2\n")
        write(tmp_path, 'c.gin', "include 'base.gin'\nLanguageModel.width = 3\n")
        path = write(tmp_path, 'a.gin', "include 'b.gin'\ninclude 'c.gin'\n")
        assert train(files=[path])[0].steps == 2

    def test_later_files_and_saved_texts(self, tmp_path):
        first = write(tmp_path, 'a.gin', f'{METHOD}\nTrain.steps = 1\n')
        second = write(tmp_path, 'b.gin', 'Train.steps = 2\n')
        assert train(files=[first, second])[0].steps == 2
        assert train(files=[second], texts=[train(files=[first])[1]])[0].steps == 2


class TestResolvedText:
    BINDINGS = (
        METHOD,
        'vora.teacher=@teacher/Vit()',
        'teacher/Vit.width=3',
        'RANK=5',
        'vora.rank=%RANK',
        'Train.data=@Data()',
        'Data.sources=[@colour/Source(), @shape/Source()]',
        'colour/Source.path="it\'s \\n here"',
        'shape/Source.path=b',
        'Data.budgets={"slots": 3}',
        'Optimizer.clip_norm=1e999',
        'Optimizer.learning_rate=1',
    )

    def test_loads_to_an_equal_configuration(self):
        config, text = train(*self.BINDINGS)
        again, same_text = train(texts=[text])
        assert again == config
        assert same_text == text

    def test_keeps_scopes_and_reads_from_the_root_down(self):
        _, text = train(*self.BINDINGS)
        assert text.startswith('Train.method = @vora()\n')
        assert 'vora.teacher = @teacher/Vit()' in text and 'teacher/Vit.width = 3' in text
        assert 'vora.rank = 5' in text and 'Data.sources = [@colour/Source(), @shape/Source()]' in text
        assert 'Train.optimizer = @Optimizer()' in text and "Optimizer.schedule = 'constant'" in text
        assert 'final_optimizer' not in text  # a default that gin cannot write stays the default

    def test_does_not_depend_on_the_order_of_bindings(self):
        assert train(*self.BINDINGS)[1] == train(*self.BINDINGS[::-1])[1]

    def test_long_values_are_broken_into_lines(self):
        pairs = [('a' * 30, 1.0), ('b' * 30, 2.0), ('c' * 90, 3.0)]
        config, text = train(METHOD, f'Optimizer.lr_multipliers={pairs}')
        assert max(map(len, text.splitlines())) <= 110
        assert train(texts=[text])[0] == config


class TestMistakes:
    @pytest.mark.parametrize(
        'bindings, parts',
        [
            (['Modle.rank=1'], ["no 'Modle'", "did you mean 'vora.rank'?"]),
            (['Optimzer.lr=1'], ["no 'Optimzer'", "did you mean 'Optimizer'?"]),
            (['LanguageModle.width=1'], ['--gin.LanguageModle.width', "did you mean 'LanguageModel'?"]),
            (['vora.rnk=1'], ["vora has no parameter 'rnk'", "did you mean 'rank'?"]),
            (['Train.rank=1'], ["did you mean 'vora.rank'?"]),
            (['Train.method=@voar()'], ["no 'voar'", "did you mean 'vora'?"]),
            (['Train.method=@vora'], ['brackets', "did you mean '@vora()'?"]),
            (['vora.rank=x'], ["vora.rank must be int, got 'x'."]),
            (['vora.rank=True'], ['vora.rank must be int, got True']),
            (['vora.rank=1e1'], ['vora.rank must be int, got 10.0; did you mean 10?']),
            (['vora.rank=None'], ['vora.rank must be int, got None']),
            (['LanguageModel.tied_head=true'], ["must be bool, got 'true'; did you mean True?"]),
            (['LanguageModel.dtype=1'], ['LanguageModel.dtype must be str, got 1']),
            (['LanguageModel.rope_theta=False'], ['must be float, got False']),
            (['vora.scope=visoin'], ["one of 'all', 'vision'", "did you mean 'vision'?"]),
            (['vora.language_model=@Vit()'], ['vora.language_model must be LanguageModel, got a Vit']),
            (['Optimizer.clip_norm=high'], ["must be float or None, got 'high'"]),
            (['vora.teacher=@Vit()', 'Vit.taps=[1, "2"]'], ["Vit.taps at [1] must be int, got '2'"]),
            (['vora.teacher=@Vit()', 'Vit.taps=3'], ['Vit.taps must be a list of int, got 3']),
            (['Optimizer.lr_multipliers=[("a", 1, 2)]'], ['at [0] must be (str, float), got 3 values']),
            (['Vit.width=3'], ['Vit.width is never used', "did you mean to add 'vora.teacher = @Vit()'?"]),
            (['Eval.limit=3'], ['Eval.limit is never used']),
            (['text_only.language_model=@LanguageModel()'], ["'Train.method = @text_only()'"]),
            (
                ['vora.teacher=@teacher/Vit()', 'techer/Vit.width=3'],
                ['techer', "did you mean 'teacher/Vit.width'?"],
            ),
            (
                ['vora.teacher=@teacher/Vit()', 'Vit.width=1', 'teacher/Vit.width=3'],
                ['Vit.width is never used', 'sets its own'],
            ),
            (['vora.rank=1', 'vora.rank=2'], ['vora.rank is set twice']),
            (['RANK=1'], ["macro 'RANK' is never used"]),
            (['steps=1'], ["did you mean 'Train.steps'?"]),
            (['vora.rank=%RNAK', 'RANK=1'], ['%RNAK is not defined', "did you mean 'RANK'?"]),
            (['vora.rank=%A', 'A=%A'], ['%A refers to itself']),
            (['Train.data=@Data()'], ['Data.sources has no value', "'Data.sources = [@Source()]'"]),
            (['Optimizer.learning_rate=-1'], ['Optimizer: learning_rate must not be negative']),
            (['vora.rank'], ['not a binding']),
            (['vora.rank=[1'], ['cannot read']),
        ],
    )
    def test_one_sentence(self, bindings, parts):
        has_method = any(b.startswith('Train.method') for b in bindings)
        text = message(*bindings, *([] if has_method else [METHOD]))
        assert all(part in text for part in parts), text

    def test_a_missing_method_is_proposed(self):
        assert message() == "Train.method has no value; write for example 'Train.method = @vora()'."

    def test_a_circle_of_references(self):
        with pytest.raises(UserError, match='refers to itself'):
            load('Train', (), ['Train.method=@Train()'], (), NAMES)

    @pytest.mark.parametrize(
        'line, parts',
        [
            ('Modle.rank = 1', ["x.gin:2: there is no 'Modle'"]),
            ('vora.rank = "x"', ["x.gin:2: vora.rank must be int, got 'x'."]),
            ('Train.steps = 1\nTrain.steps = 2', ['x.gin:3: Train.steps is set twice, first at ', 'x.gin:2']),
            ('Train.stage = pretrain', ["x.gin:2: cannot read 'Train.stage = pretrain'", 'text in quotes']),
            ('Train.steps = [1,', ['x.gin:', 'unclosed bracket']),
            (
                "include 'none.gin'",
                ['x.gin:2: cannot read the configuration file', 'none.gin', 'No such file'],
            ),
            ('import os', ['x.gin:2: imports are not needed']),
            ('techer/vora.rank = 1', ['x.gin:2: techer/vora.rank is never used']),
        ],
    )
    def test_files_are_named_with_the_line(self, tmp_path, line, parts):
        text = message(files=[write(tmp_path, 'x.gin', f'{METHOD}\n{line}\n')])
        assert all(part in text for part in parts), text

    def test_an_included_file_is_named(self, tmp_path):
        write(tmp_path, 'sub/model.gin', '\n\nLanguageModel.widht = 1\n')
        text = message(files=[write(tmp_path, 'x.gin', f"include 'sub/model.gin'\n{METHOD}\n")])
        assert 'model.gin:3: LanguageModel' in text and "did you mean 'width'?" in text

    def test_a_missing_file(self, tmp_path):
        assert 'No such file' in message(files=[tmp_path / 'none.gin'])
        assert 'directory' in message(files=[tmp_path])


class TestSplitArguments:
    def test_takes_the_gin_arguments_out(self):
        argv = [
            'x.gin',
            '--gin.vora.rank=64',
            '--workdir',
            'w',
            '--gin_file',
            'a.gin',
            '--gin_file=b.gin',
            '--gin.A.b',
            '-1',
            '--gin_bindings',
            'A.c=1\n  A.d="x=y"',
            '--resume',
        ]
        assert split_arguments(argv) == (
            ['x.gin', '--workdir', 'w', '--resume'],
            ['a.gin', 'b.gin'],
            ['vora.rank=64', 'A.b=-1', 'A.c=1', 'A.d="x=y"'],
        )

    def test_leaves_what_follows_two_dashes(self):
        assert split_arguments(['--', '--gin.a=1']) == (['--', '--gin.a=1'], [], [])

    @pytest.mark.parametrize(
        'argv', [['--gin.vora.rank'], ['--gin.vora.rank', '--workdir'], ['--gin-file', 'x'], ['--gin']]
    )
    def test_mistakes(self, argv):
        with pytest.raises(UserError, match='--gin'):
            split_arguments(argv)


def test_importing_the_loader_brings_no_jax():
    script = "import sys, vora_jax.cli.gin_config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', script], check=False).returncode == 0
