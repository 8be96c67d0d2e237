"""Memory of a host and its workers stays where it is."""
import json
import subprocess
import sys

import numpy as np
import pytest
from generated_set import mixed

BATCHES, WARM_UP, MOST_SLOPE = 2000, 300, 2.0  # megabytes for each 1,000 batches

PROGRAM = """
import gc, json, pathlib, sys
sys.path[:0] = [sys.argv[1]]
from generated_set import RULE
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches

def resident(process):
    return int(pathlib.Path(f'/proc/{process}/statm').read_text().split()[1]) * 4096 / 2**20

def children():
    return [int(word) for path in pathlib.Path('/proc/self/task').glob('*/children') for word in path.read_text().split()]

if __name__ == '__main__':
    loader = batches(eval(sys.argv[2]), RULE, 4, 0, (0, 1), int(sys.argv[3]), quarantine=sys.argv[4], cache_bytes=1 << 18)
    measured = []
    for number in range(int(sys.argv[5])):
        next(loader)
        if number % 20 == 0:
            measured.append([resident('self'), *(resident(process) for process in sorted(children()))])
    print(json.dumps({'measured': measured, 'epochs': loader.epoch(loader.get_state()), 'bad': len(loader.warnings)}))
    loader.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_memory_does_not_grow(tmp_path, workers):
    """Pictures of which few are cached, many epochs, a source of which a picture is damaged."""
    data = mixed(tmp_path, 150, pictures=80, most=120, max_slots=512, max_patches=400, max_images=20, max_bad_fraction=0.5)
    (tmp_path / 'images' / '5.jpg').write_bytes((tmp_path / 'images' / '5.jpg').read_bytes()[:-40])
    program = tmp_path / 'read.py'
    program.write_text(PROGRAM)
    arguments = [__file__.rpartition('/')[0], repr(data), str(workers), str(tmp_path / 'quarantine.jsonl'), str(BATCHES)]
    result = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found['epochs'] > 5 and found['bad'] > 0
    processes = min(map(len, found['measured']))
    assert processes > workers
    steps = np.arange(0, BATCHES, 20)
    megabytes = np.array([sample[:processes] for sample in found['measured']])
    warm = steps >= WARM_UP
    slopes = [float(np.polyfit(steps[warm], megabytes[warm, process], 1)[0] * 1000) for process in range(processes)]
    print(f'{workers} workers, {found["epochs"]:.1f} epochs: at the end {megabytes[-1].round(1).tolist()} MB, slopes '
          f'{np.round(slopes, 2).tolist()} MB for 1,000 batches')
    assert max(slopes) < MOST_SLOPE, megabytes[::10].round(1).tolist()
