"""The layouts of export, by name."""
from vora_jax.convert.export import encoder as export_encoder
from vora_jax.convert.export import llava as export_llava
from vora_jax.convert.export import llm as export_llm
from vora_jax.convert.export import own as export_own
from vora_jax.convert.export import peft as export_peft
from vora_jax.convert.export import vora as export_vora
from vora_jax.convert.export.exportable import Exportable, exportable, folded
from vora_jax.convert.export.plan import Plan, Request
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params, UserError

LAYOUTS = {'own': export_own.plan, 'vora': export_vora.plan, 'llava': export_llava.plan, 'llm': export_llm.plan,
           'peft': export_peft.plan, 'encoder': export_encoder.plan}
MERGED = ('llava', 'llm')  # hold no adapters
ADAPTERS = 'adapters'  # what a stage trained, in its authors' own files: `export_adapters`, which needs the method


def choose_layout(model, layout: str | None) -> str:
    """The layout asked for; by default that of stock encoders for an encoder, and our own for all else.

    Raises:
        UserError: there is no such layout, or none that takes an encoder.
    """
    is_llm = isinstance(model, VisionLanguageModel)
    layout = layout or ('own' if is_llm else 'encoder')
    if layout not in LAYOUTS:
        raise UserError(f'export: there is no layout {layout!r}; choose one of {", ".join(LAYOUTS)}.')
    if not is_llm and layout != 'encoder':
        raise UserError(f'export: a {type(model).__name__} does not generate text, so it has no layout `{layout}`; take '
                        '`encoder`.')
    return layout


def select(params: Params, model, layout: str, merge: bool) -> tuple[Exportable, bool]:
    """(what the layout holds of a checkpoint, whether adapters were folded).

    Raises:
        UserError: there is nothing to fold, or it cannot be folded; or see `exportable`.
    """
    keep = layout == 'vora' and not merge
    what = exportable(params, model, keep_distillation=keep)
    if merge and what.is_merged:
        raise UserError('export: this checkpoint has no adapters to merge; leave out --merge.')
    if merge and layout == 'peft':
        raise UserError('export: the layout `peft` holds adapters as they are; leave out --merge, or take another layout.')
    if merge or layout in MERGED and not what.is_merged:
        return folded(what), True
    return what, False


def plan_of(request: Request, layout: str) -> Plan:
    """What the folder will hold."""
    return LAYOUTS[layout](request)
