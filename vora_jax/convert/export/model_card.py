"""README.md of an exported folder."""
from vora_jax.convert.export.merge_report import MergeReport
from vora_jax.convert.export.plan import Plan, Provenance
from vora_jax.vision.image_encoder import ImageEncoder

CONFIG_FILE = 'vora_config.gin'


def model_card(plan: Plan, layout: str, merged: bool, provenance: Provenance, dropped: tuple[str, ...],
               report: MergeReport | None = None) -> str:
    """What the model is, how to run it, and where it comes from."""
    sees = isinstance(plan.model, ImageEncoder) or plan.model.vision is not None
    lines = ['---', f'library_name: {"peft" if layout == "peft" else "transformers"}',
             f'pipeline_tag: {_task(plan, sees)}']
    if provenance.base:
        lines += ['base_model:', *(f'- {name}' for name in provenance.base)]
    lines += ['---', f'{_kind(plan, sees)} trained with vora_jax, in the layout `{layout}`.', '', '```python',
              plan.usage.rstrip(), '```', '']
    if plan.notes:
        lines += ['To know:', '', *(f'- {note}' for note in plan.notes), '']
    lines += ['Where it comes from:', '']
    facts = (('method', provenance.method), ('stage', provenance.stage), ('step', provenance.step),
             ('started from', ', '.join(provenance.base)), ('data', ', '.join(provenance.sources)),
             ('hash of the data', provenance.manifest),
             ('adapters', 'merged into the weights in float32' if merged else ''),
             ('left out, because only training needs them', ', '.join(dropped)))
    lines += [f'- {name}: {value}' for name, value in facts if value != '']
    lines += [f'- {line}' for line in (report.lines() if report else ())]
    if provenance.config_text:
        lines += [f'- configuration: `{CONFIG_FILE}`']
    return '\n'.join(lines) + '\n'


def _kind(plan: Plan, sees: bool) -> str:
    if isinstance(plan.model, ImageEncoder):
        return f'A vision encoder of {plan.model.vit.num_layers} layers of width {plan.model.vit.width},'
    return f'A {"vision-language" if sees else "language"} model of {plan.model.llm.num_layers} layers of width ' \
           f'{plan.model.llm.width},'


def _task(plan: Plan, sees: bool) -> str:
    if isinstance(plan.model, ImageEncoder):
        return 'image-feature-extraction'
    return 'image-text-to-text' if sees else 'text-generation'
