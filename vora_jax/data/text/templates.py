"""Chat templates: what stands around questions and answers.

Every template is a value of `Template`; `opening` and `question` put its texts together. No template language is run.
"""
import dataclasses
import json

from vora_jax.data.text.special_tokens import IM_END, IM_START, IMAGE
from vora_jax.data.text.tokenizer import Tokenizer
from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Template:
    """The texts of a chat template, in the order in which they stand.

    system: message where a record has none; '' is no message.
    begin: special token that starts a conversation; '' for none.
    leads_with_bos: the tokenizer's own begin token, if it has one, is put in front as an id. What follows is then the
        start of a text: a tokenizer that puts a space in front of texts does so, unlike behind `begin`.
    around_system, around_question: texts before and after.    system_in_question: the system message is part of the
        first question (and stripped with it).
    around_answer: learned texts before and after an answer.
    end: ends an answer, learned; '' is the tokenizer's own end of a text.
    between: stands between a turn and the next.    closes: and also after the last one.
    strip: messages lose the white space around them.
    pictures_only: of a question only its pictures are shown.
    pictures_first: (text around a question's pictures, taken out of it and put in front, where `<image>` stands for all of
        them; text in front of a first question without any); () leaves pictures where they are.
    apart: questions and answers are tokenised each for itself; otherwise the conversation is tokenised as a whole, so
        that a token may hold the last characters of a prompt and the first of its answer.
    answers_apart: an answer is tokenised for itself where such a token would come out (Qwen's `:The`), so that a prompt is
        always the beginning of what was trained on.
    """

    name: str
    system: str = ''
    begin: str = ''
    leads_with_bos: bool = False
    around_system: tuple[str, str] = (f'{IM_START}system\n', f'{IM_END}\n')
    system_in_question: bool = False
    around_question: tuple[str, str] = (f'{IM_START}user\n', f'{IM_END}\n{IM_START}assistant\n')
    around_answer: tuple[str, str] = ('', '')
    end: str = IM_END
    between: str = '\n'
    closes: bool = False
    strip: bool = False
    pictures_only: bool = False
    pictures_first: tuple[str, ...] = ()
    apart: bool = False
    answers_apart: bool = False

    def opening(self, system: str | None = None) -> str:
        """The text before the first question; `system`: the record's own message."""
        message = self._system(system)
        if self.strip and not self.system_in_question:
            message = message.strip()
        return self.begin + (message.join(self.around_system) if message and not self.system_in_question else '')

    def question(self, text: str, first: bool, system: str | None = None) -> str:
        """The text of one question, up to where its answer begins."""
        if self.pictures_only:
            text = IMAGE * text.count(IMAGE)
        lead = ''
        if self.pictures_first:
            pictures, text = IMAGE * text.count(IMAGE), text.replace(IMAGE, '')
            some, none = self.pictures_first
            lead = some.replace(IMAGE, pictures) if pictures else none * first
        message = self._system(system)
        if first and self.system_in_question and message:
            text = message.join(self.around_system) + text
        return lead + (text.strip() if self.strip else text).join(self.around_question)

    def answer(self, text: str) -> str:
        """The learned text of an answer, without its end mark."""
        return (text.strip() if self.strip else text).join(self.around_answer)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """Id that ends an answer.

        Raises:
            UserError: the tokenizer has no such token. (A ChatML that is tokenised apart ends with the tokenizer's own
                end of text then.)
        """
        if not self.end:
            return tokenizer.eos_id
        token = tokenizer.token_id(self.end)
        if token is not None:
            return token
        if not self.end.strip():  # a line break, which no tokenizer calls special
            return tokenizer.encode_spans(self.end, start=False)[0][-1]
        if self.apart:
            return tokenizer.eos_id
        raise UserError(f'Data.template {self.name!r} ends answers with {self.end}, for which the tokenizer has no token; '
                        'choose the template that the language model was trained with.')

    def begin_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids in front of all text; [] if the template begins with text or the tokenizer has no such token."""
        return [tokenizer.bos_id] if self.leads_with_bos and tokenizer.bos_id is not None else []

    def _system(self, system: str | None) -> str:
        return self.system if system is None else system


VICUNA_SYSTEM = ('A chat between a curious user and an artificial intelligence assistant. '
                 "The assistant gives helpful, detailed, and polite answers to the user's questions.")
HEADER = '<|start_header_id|>{}<|end_header_id|>\n\n'
CHATML = Template('chatml', apart=True)
# LaVIN's sequence: the pictures, or that there are none, come first and the answer follows the question without a space.
# Its text is tokenised in stretches that all begin with a space; the spaces are written out here, so that the ids are
# the same and an exported folder can give them too. A question of ScienceQA brings its own `Response:`.
IMAGE_FIRST = Template('image_first', leads_with_bos=True, around_system=('', ' '), around_question=('', ''), end='',
                       between=' ', strip=True, pictures_first=(f'Image: {IMAGE} ', 'Image: N/A '), answers_apart=True)

TEMPLATES = {template.name: template for template in (
    CHATML,
    dataclasses.replace(CHATML, name='chatml_system', system='You are a helpful assistant.'),
    dataclasses.replace(CHATML, name='vora', system='You are a helpful assistant.'),
    Template('qwen2.5', 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.', closes=True),
    Template('smollm2', 'You are a helpful AI assistant named SmolLM, trained by Hugging Face', closes=True),
    # LLaVA-1.5's conv_vicuna_v1.
    Template('vicuna_v1', VICUNA_SYSTEM, leads_with_bos=True, around_system=('', ' '),
             around_question=('USER: ', ' ASSISTANT:'), around_answer=(' ', ''), end='</s>', between=''),
    Template('llama2', begin='<s>', around_system=('<<SYS>>\n', '\n<</SYS>>\n\n'), system_in_question=True,
             around_question=('[INST] ', ' [/INST]'), around_answer=(' ', ' '), end='</s>', between='<s>', strip=True),
    Template('llama3', begin='<|begin_of_text|>', around_system=(HEADER.format('system'), '<|eot_id|>'),
             around_question=(HEADER.format('user'), f'<|eot_id|>{HEADER.format("assistant")}'), end='<|eot_id|>',
             between='', strip=True),
    # LLaVA's conv_plain for pretraining: a picture, its caption, a line break.
    Template('plain', leads_with_bos=True, around_system=('', ''), around_question=('', ''), end='\n',
             between='', pictures_only=True),
    IMAGE_FIRST,
    dataclasses.replace(IMAGE_FIRST, name='image_first_instruction', around_question=('Instruction: ', '\nResponse:')),
)}


def find_template(name: str) -> Template:
    """The template of this name; UserError naming the known ones otherwise."""
    if name not in TEMPLATES:
        raise UserError(f'Data.template {name!r} is unknown; choose one of {", ".join(TEMPLATES)}.')
    return TEMPLATES[name]


def jinja(template: Template, tokenizer: Tokenizer) -> str:
    """The template as `transformers` reads it, for one tokenizer; answers are marked as `generation`.

    Messages are strings or lists of parts; a part of type image becomes `<image>`. A conversation may begin with a
    system message. `add_generation_prompt` is obeyed where it makes a difference.
    """
    begin = 'bos_token' if template.begin_ids(tokenizer) else _quoted(template.begin)
    # Behind <s> no tokenizer puts the space that it puts in front of texts: the template does.
    spaced = template.leads_with_bos and tokenizer.encode('a') != tokenizer.encode_spans('a', start=False)[0]
    strip = ' | trim' if template.strip else ''
    content, lead = f'text(message.content){strip}', ''
    if template.pictures_first:
        count = "(text(message.content).split('<image>') | length - 1)"
        before, after = map(_quoted, template.pictures_first[0].split(IMAGE))
        lead = (f"({before} + '<image>' * {count} + {after} if {count} else "
                f"{_quoted(template.pictures_first[1])} if loop.first else '') + ")
        content = f"text(message.content) | replace('<image>', ''){strip}"
    if template.pictures_only:
        content = "'<image>' * (text(message.content).split('<image>') | length - 1)"
    if template.system_in_question:
        wrapped = ' + '.join((_quoted(template.around_system[0]), 'state.system', _quoted(template.around_system[1])))
        content = f"((({wrapped}) if state.system and loop.first else '') + text(message.content)){strip}"
    lines = [
        "{%- macro text(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
        "{{- '<image>' if part.type == 'image' else part.text -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        f'{{%- set state = namespace(system={_quoted(template.system)}) -%}}',
        "{%- if messages[0].role == 'system' -%}{%- set state.system = text(messages[0].content) -%}{%- endif -%}",
        f'{{{{- {begin} -}}}}',
    ]
    if template.strip and not template.system_in_question:
        lines.append('{%- set state.system = state.system | trim -%}')
    if spaced and not template.pictures_only:
        lines.append("{%- if state.system[:1] not in (' ', '\u2581') -%}{{- ' ' -}}{%- endif -%}")
    if not template.system_in_question:
        before, after = map(_quoted, template.around_system)
        lines.append(f'{{%- if state.system -%}}{{{{- {before} + state.system + {after} -}}}}{{%- endif -%}}')
    asked, told = template.around_question
    # The turns alternate, so the marker of the assistant can stand at the end of every question but an unanswered one.
    marker = asked and told.removeprefix(IM_END + '\n').removeprefix('<|eot_id|>')
    always = told[:len(told) - len(marker)] if marker != told else ''
    between = _quoted(template.between)
    before, after = map(_quoted, template.around_answer)
    end = _quoted(template.end) if template.end else 'eos_token'
    tail = f'{{{{- {between} -}}}}' if template.closes else \
        f'{{%- if not loop.last or add_generation_prompt -%}}{{{{- {between} -}}}}{{%- endif -%}}'
    lines += [
        "{%- for message in messages if message.role != 'system' -%}",
        "{%- if message.role == 'user' -%}",
        f'{{{{- {lead}{_quoted(asked)} + {content} + {_quoted(always)} -}}}}',
        f'{{%- if not loop.last or add_generation_prompt -%}}{{{{- {_quoted(marker)} -}}}}{{%- endif -%}}',
        '{%- else -%}',
        f'{{%- generation -%}}{{{{- {before} + text(message.content){strip} + {after} + {end} -}}}}'
        '{%- endgeneration -%}',
        tail, '{%- endif -%}', '{%- endfor -%}']
    return '\n'.join(lines) + '\n'


def _quoted(text: str) -> str:
    """The text as a string of the template language."""
    return json.dumps(text, ensure_ascii=False)
