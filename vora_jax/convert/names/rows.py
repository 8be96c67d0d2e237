"""Rows of linears and norms."""
from vora_jax.convert.names.layouts import SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row


def linear_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """Kernel and bias of a linear."""
    return Row(f'{ours}/kernel', f'{theirs}.weight', TRANSPOSED), Row(f'{ours}/bias', f'{theirs}.bias', SAME)


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """Scale and bias of a norm; a root-mean-square norm has no bias, and no use for that row."""
    return Row(f'{ours}/scale', f'{theirs}.weight', SAME), Row(f'{ours}/bias', f'{theirs}.bias', SAME)
