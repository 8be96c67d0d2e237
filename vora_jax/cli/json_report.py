"""Where `--json` writes."""
import pathlib

from vora_jax.types import UserError


def write_report(text: str, file: str) -> bool:
    """Writes a JSON text to a file, or prints it for '-'; True where it was printed and nothing else should be.

    Raises:
        UserError: the file cannot be written.
    """
    if file == '-':
        print(text)
        return True
    try:
        pathlib.Path(file).write_text(text + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'--json {file} cannot be written ({error.strerror}); give another file.') from error
    return False
