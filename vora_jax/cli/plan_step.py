"""The child of `vora plan`: compiles one step into a folder. Started by `cli.plan` only."""
import json
import pathlib
import sys

from vora_jax.cli import gin_config
from vora_jax.planning import child, compile_step, topology
from vora_jax.types import UserError

REQUEST = 'request.json'


def main(folder: str) -> int:
    """Reads REQUEST from the folder and compiles; 0, or 2 after a user's mistake, told in one sentence."""
    child.end_with_parent()
    request = json.loads(pathlib.Path(folder, REQUEST).read_text(encoding='utf-8'))
    try:
        config, _ = gin_config.load('Train', texts=[request['config']])
        compile_step.compile_step(config, topology.parse(request['topology'], request['slices']), pathlib.Path(folder))
    except UserError as error:
        print(f'vora: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
